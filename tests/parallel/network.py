"""Hosts on one machine: network namespaces with a switch between them, whose links can be cut."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def why_not() -> str:
    """Say why namespaces cannot be made here; empty where they can."""
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program) is None:
            return f"the program {program} is missing (Debian packages iproute2 and util-linux)"
    done = subprocess.run(["unshare", "--net", "--uts", "true"], check=False, capture_output=True, text=True)
    return "" if done.returncode == 0 else f"network namespaces are not allowed here: {done.stderr.strip()}"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass(kw_only=True)
class Network:
    """`host0`, `host1`, ... with addresses 10.77.0.1, 10.77.0.2, ... that exist in their namespaces only."""

    num_hosts: int
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.switch = f"pl{os.getpid()}s"
        self.hosts = [f"pl{os.getpid()}h{number}" for number in range(self.num_hosts)]

    def __enter__(self) -> Network:
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        ip("-n", self.switch, "link", "set", "br0", "up")
        for number, host in enumerate(self.hosts):
            ip("netns", "add", host)
            port = f"port{number}"
            ip("-n", self.switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("-n", self.switch, "link", "set", port, "master", "br0", "up")
            ip("-n", host, "addr", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        return self

    def __exit__(self, *exception: object) -> None:
        for number in range(self.num_hosts):
            self.kill(number)
        for process in self.processes:
            process.wait(30)
        for namespace in (*self.hosts, self.switch):
            subprocess.run(["ip", "netns", "del", namespace], check=False)

    @staticmethod
    def address(number: int) -> str:
        return f"10.77.0.{number + 1}"

    def run(self, number: int, command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        """Start a program on a host, which also bears the host's name."""
        inside = ["sh", "-c", f'hostname host{number}; exec "$@"', "sh", *command]
        process = subprocess.Popen(
            ["ip", "netns", "exec", self.hosts[number], "unshare", "--uts", *inside],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | environment,
        )
        self.processes.append(process)
        return process

    def cut(self, number: int) -> None:
        """Unplug a host."""
        ip("-n", self.switch, "link", "set", f"port{number}", "down")

    def kill(self, number: int) -> None:
        """End every process of a host at once."""
        pids = self.pids(number)
        for pid in pids:
            os.kill(int(pid), 9)

    def pids(self, number: int) -> list[str]:
        """Name the processes of a host."""
        return subprocess.run(
            ["ip", "netns", "pids", self.hosts[number]], check=False, capture_output=True, text=True
        ).stdout.split()

    def await_empty(self, number: int, *, until: float) -> None:
        """Wait until no process of a host is left."""
        while self.pids(number):
            assert time.monotonic() < until, f"processes of host{number} are still there"
            time.sleep(0.1)
