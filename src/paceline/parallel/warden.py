"""The warden: a tiny process beside each rank that ends it where it can no longer end itself. Standard library alone.

A rank that is stopped, or stuck inside one long call, runs no thread of its own that could notice; and torch's elastic
agent waits for ever for the answer of a store behind a cut link. The warden sits in a session of its own and listens:

```
rank   -- "may be silent for 45 s" --> warden       once a second, through a pipe
rank   -- "the store is lost"      --> warden       the agent has to end too
rank  X   (end of the pipe)            warden       leaves, after the agent where the store was lost
```

It runs as a script, `python -I -S warden.py RANK_PID AGENT_PID SENTENCE`, so that it starts in milliseconds.
The agent's number is 0 where it cannot be seen, as from the first process of a container.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time
from dataclasses import dataclass

STOPPED_S = 10.0
"""How long a rank may be stopped, when the process that started it is not: then it is no job that was suspended."""
AGENT_S = 15.0
"""How long the agent of a rank that lost the store may take to end by itself."""
_POLL_S = 0.5
_LOST = "lost"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that cannot be mistaken for a later one with the same number."""

    pid: int
    started: int
    """Clock ticks from the start of the machine to that of the process."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """Name a process that runs; ProcessLookupError where there is none."""
        state = _stat(pid)
        if state is None:
            raise ProcessLookupError(f"there is no process {pid}")
        return cls(pid=pid, started=state[1])

    def state(self) -> str:
        """Its letter in /proc: R, S or D while it runs, T when it is stopped; `X` when it is gone."""
        found = _stat(self.pid)
        if found is None or found[1] != self.started or found[0] == "Z":
            return "X"
        return found[0]

    def kill(self) -> None:
        """End it without asking."""
        if self.state() != "X":
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)


def space_of_processes() -> str:
    """Name whose numbers of processes this one shares: containers of a machine have each their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    """State and start of a process, None where there is none. The name before them may hold spaces and brackets."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
            fields = stream.read().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])


def guard(rank: Process, agent: Process, pipe: int, sentence: str) -> None:
    """Watch a rank until it is gone."""
    deadline, stopped_since, lost = float("inf"), float("inf"), False
    rest = ""
    while True:
        ready, _, _ = select.select([pipe], [], [], _POLL_S)
        now = time.monotonic()
        if ready:
            chunk = os.read(pipe, 4096)
            if not chunk:
                break
            *lines, rest = (rest + chunk.decode()).split("\n")
            for line in lines:
                if line == _LOST:
                    lost = True
                else:
                    deadline = now + float(line)
        stopped = rank.state() == "T" and agent.state() != "T"
        stopped_since = min(stopped_since, now) if stopped else float("inf")
        if now - stopped_since > STOPPED_S or now > deadline:
            reason = f"was stopped for {STOPPED_S:.0f} s" if stopped else "was stuck and gave no sign of life"
            with contextlib.suppress(OSError):
                os.write(2, f"paceline: {sentence} {reason}; it was ended.\n".encode())
            rank.kill()
            break
    if lost:
        _await_agent(agent)


def _await_agent(agent: Process) -> None:
    end = time.monotonic() + AGENT_S
    while agent.state() != "X" and time.monotonic() < end:
        time.sleep(_POLL_S)
    agent.kill()


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends; nothing where there is no such kernel."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def main() -> None:
    """Guard the process that started this one."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    rank, agent = map(int, sys.argv[1:3])
    unseen = Process(pid=0, started=0)
    with contextlib.suppress(ProcessLookupError):
        guard(Process.of(rank), Process.of(agent) if agent else unseen, sys.stdin.fileno(), sys.argv[3])


if __name__ == "__main__":
    main()
