"""The heartbeat: threads of each rank that tell the others where it is, and end it when one of them is in trouble.

```
main thread      report(step, phase)            an assignment, no more
watch thread     judges all ranks (lookout.py), looks after the processes of this host, ends this process
courier thread   carries beats to the store and back (courier.py)
warden process   ends this process where it cannot end itself (warden.py)
```

Whoever finds a fault writes it into the store; the first one counts, and all ranks end with it. On each host one rank
says it: the first to claim that. Rank 0 and the store's host are nothing special: a store that does not answer is a
fault too, and under torchrun the store lives in the agent, not in a rank.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError
from paceline.parallel import warden
from paceline.parallel.courier import PERIOD_S, Courier
from paceline.parallel.fault import Fault
from paceline.parallel.lookout import LEFT, Beat, Lookout
from paceline.parallel.warden import Process, space_of_processes
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import NoReturn

    from torch._C._distributed_c10d import Store

    from paceline.parallel.config import LimitsConfig
    from paceline.parallel.preemption import Preemption
    from paceline.parallel.rank import Rank

GRACE_S = 5.0
"""How long the ranks of a host may take to end once a fault is known; those that are left then are killed."""
_SUSPICION_S = 3.0
"""Silence that is blamed where this rank's connections broke."""
_PATIENCE_S = 6.0
"""How long a rank with broken connections waits for news of whose fault that is."""
_STOPPED_S = 2.5
FAULT_FILE = "PACELINE_FAULT_FILE"
"""Environment variable with the file that a fault is written to, for the launcher to word; else it is printed."""
_CONNECTION = re.compile(
    r"connection (closed|reset|refused|was)|broken pipe|gloo|nccl|timed out|timeout|socket|peer|remote process",
    re.IGNORECASE,
)
_TORCH = str(Path(torch.__file__).parent)
_STANDARD = sysconfig.get_path("stdlib")
_WAITING = (str(Path(_TORCH) / "distributed"), str(Path(_TORCH) / "autograd" / "graph.py"))


class Heartbeat:
    """One rank's part in watching over all of them."""

    def __init__(
        self,
        store: Store,
        rank: Rank,
        limits: LimitsConfig,
        *,
        address: str,
        preemption: Preemption,
        may_exit: bool = True,
    ) -> None:
        """Prepare; `store` is a connection that nothing else uses, `address` names it for messages.

        may_exit: whether this process is ours to end when its own exception is the fault.
        """
        self._preemption = preemption
        self._store = store
        self._rank = rank
        self._limits = limits
        self._address = address
        self._may_exit = may_exit
        self._mark: tuple[int, str] = (0, "start")
        self._source: Callable[[], tuple[int, str]] | None = None
        self._hosts: dict[int, str] = {rank.rank: rank.host}
        self._peers: dict[int, Process] = {}
        self._gone: dict[int, int] = {}
        self._stopped: dict[int, float] = {}
        self._lookout = Lookout(limits, self._hosts)
        self._seen: tuple[int, str] = self._mark
        self._seen_at = time.monotonic()
        self._beat = self._next_beat(0)
        self._suspicious = False
        self._closing = threading.Event()
        self._once = threading.Lock()
        self._courier = Courier(store, rank)
        self._worker = threading.get_ident()
        self._watch = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._warden: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the threads and the warden."""
        command = [sys.executable, "-I", "-S", warden.__file__, str(os.getpid()), str(os.getppid())]
        sentence = f"rank {self._rank.rank} on {self._rank.host}"
        self._warden = subprocess.Popen([*command, sentence], stdin=subprocess.PIPE, start_new_session=True)
        self._courier.start(self._beat)
        self._watch.start()

    def report(self, step: int, phase: str) -> None:
        """Say where the main thread is: start, index, compile, step, evaluation, checkpoint or end."""
        self._mark = (step, phase)

    def follow(self, source: Callable[[], tuple[int, str]] | None) -> None:
        """Ask `source` for (step, phase) once a second instead, from a thread; None goes back to `report`."""
        self._source = source

    def stop(self, *, wait_s: float = 5.0) -> None:
        """Leave: from now on this rank's silence means nothing. Returns when the others can know it."""
        self._mark, self._source = (self._mark[0], LEFT), None
        self._closing.set()
        self._courier.leave(self._next_beat(self._beat.count + 1, leaving=True), wait_s)
        self._watch.join(wait_s)
        if self._warden is not None and self._warden.stdin is not None:
            with contextlib.suppress(OSError):  # it may have been ended, by the system for want of memory for instance
                self._warden.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._warden.wait(wait_s)

    def conclude(self, error: BaseException) -> None:
        """End all ranks after an exception of this one; returns only where the process is not ours to end.

        An exception that may come from a broken connection waits for news of whose fault it is.
        """
        if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
            self._suspicious = True
            end = time.monotonic() + _PATIENCE_S
            while time.monotonic() < end:
                time.sleep(0.1)  # the watch thread ends this process if it finds the culprit
        step, phase = self._place()
        own = Fault.of(error, rank=self._rank.rank, host=self._rank.host, step=step, phase=phase)
        agreed = self._courier.post(own, wait_s=3.0)
        if agreed == own and not self._may_exit:
            self._closing.set()
            return
        self._end(agreed)

    def _place(self) -> tuple[int, str]:
        return self._source() if self._source is not None else self._mark

    def _next_beat(self, count: int, *, leaving: bool = False) -> Beat:
        """Note where the main thread is."""
        place, now = self._place(), time.monotonic()
        if place != self._seen:
            self._seen, self._seen_at = place, now
        where, waits = ("", False) if leaving or count == 0 else _where(sys._current_frames().get(self._worker))
        return Beat(count=count, step=place[0], phase=place[1], phase_s=now - self._seen_at, where=where, waits=waits)

    def _run(self) -> None:
        while not self._closing.wait(PERIOD_S / 2):
            self._beat = self._next_beat(self._beat.count + 1)
            self._courier.carry(self._beat)
            self._reassure_warden()
            if self._courier.people and not self._peers:
                self._meet(self._courier.people)
            fault = self._courier.verdict
            if fault is None:
                found = self._judge(time.monotonic())
                fault = self._courier.post(found, wait_s=3.0) if found is not None else None
            if fault is not None and not self._closing.is_set():
                self._end(fault)

    def _meet(self, people: dict[int, dict[str, str | int]]) -> None:
        for rank, person in people.items():
            self._hosts[rank] = str(person["host"])
            if (person["node"], person["space"]) == (self._rank.node, space_of_processes()):
                self._peers[rank] = Process(pid=int(person["pid"]), started=int(person["started"]))

    def _judge(self, now: float) -> Fault | None:
        """Look for a fault, the surest signs first."""
        own = {self._rank.rank: self._beat}
        self._lookout.hear(self._courier.beats | own, now)
        fault = self._dead_or_stopped(now)
        if fault is None:
            patience_s = _SUSPICION_S if self._suspicious else self._limits.limit_silence
            stuck_since = self._courier.stuck_since
            if stuck_since is None or now - stuck_since < 2 * PERIOD_S:
                fault = self._lookout.silent(now, after_s=patience_s)
            else:  # who hears nothing cannot tell who is silent
                fault = self._store_fault(now - stuck_since, patience_s)
        return fault or self._lookout.overdue(now) or self._unheeded(now)

    def _dead_or_stopped(self, now: float) -> Fault | None:
        """Look at the processes of the other ranks on this host."""
        for rank, process in self._peers.items():
            beat = self._lookout.last(rank)
            if beat is not None and beat.phase == LEFT:
                continue
            state = process.state()
            if state == "X":
                first = self._gone.setdefault(rank, self._courier.rounds)
                if self._courier.rounds > first + 1:  # it may have left between two rounds
                    return self._lookout.fault(rank, "was killed, or ended without a word")
            if state != "T":
                self._stopped.pop(rank, None)
            elif now - self._stopped.setdefault(rank, now) > _STOPPED_S and rank != self._rank.rank:
                return self._lookout.fault(rank, "was stopped")
        return None

    def _unheeded(self, now: float) -> Fault | None:
        """End where a signal asks for it and no loop looks; not at once, for the signal may be about a fault."""
        asked_at = self._preemption.asked_at
        if asked_at is None or self._preemption.is_heeded or now - asked_at < _SUSPICION_S:
            return None
        return self._lookout.fault(self._rank.rank, "was asked to end by a signal")

    def _store_fault(self, stuck_s: float, patience_s: float) -> Fault | None:
        if stuck_s <= patience_s:
            return None
        step, phase = self._beat.step, self._beat.phase
        what = f"gets no answer from the store at {self._address}: that host, or the link to it, is gone"
        return Fault(rank=self._rank.rank, host=self._rank.host, step=step, phase=phase, what=what)

    def _reassure_warden(self) -> None:
        """Say how long silence may last: what is left of the phase, and the time in which others would act."""
        limit_s = self._limits.of(self._beat.phase)
        left_s = max(limit_s - self._beat.phase_s, 0.0) + self._limits.limit_silence if limit_s > 0 else 1e9
        self._tell_warden(f"{left_s:.0f}")

    def _tell_warden(self, line: str) -> None:
        if self._warden is not None and self._warden.stdin is not None:
            with contextlib.suppress(OSError, ValueError):
                self._warden.stdin.write(f"{line}\n".encode())
                self._warden.stdin.flush()

    def _end(self, fault: Fault) -> NoReturn:
        """End this process; one rank of the host says why, and kills what is left of the others."""
        if not self._once.acquire(blocking=False):
            while True:
                time.sleep(60)  # the other thread is at it
        stuck_since = self._courier.stuck_since
        if stuck_since is not None and time.monotonic() - stuck_since > 2 * PERIOD_S:
            self._tell_warden("lost")
        claim = _claim(f"paceline {os.getuid()} {self._rank.run} {self._rank.node}")
        if claim is not None:
            _say(fault)
            end = time.monotonic() + GRACE_S
            others = [process for rank, process in self._peers.items() if rank != self._rank.rank]
            while others and time.monotonic() < end:
                for process in others:
                    if process.state() == "T":
                        process.kill()
                others = [process for process in others if process.state() != "X"]
                time.sleep(0.05)
            for process in others:
                process.kill()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(fault.status)


def _where(frame: FrameType | None) -> tuple[str, bool]:
    """Name the innermost line outside torch and Python's own modules, and whether torch waits for others there."""
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        waits = waits or name.startswith(_WAITING)
        own = name.startswith(_TORCH) or (name.startswith(_STANDARD) and "site-packages" not in name)
        if not own and frame.f_back is not None:
            return f"{Path(name).name}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        frame = frame.f_back
    return "", waits


def _claim(name: str) -> socket.socket | None:
    """Claim the right to speak for this host; the kernel gives it back when the process ends."""
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        claim.bind("\0" + name[:100])
    except OSError:
        claim.close()
        return None
    return claim


def _say(fault: Fault) -> None:
    """Give the fault to the launcher, or else to the console."""
    file = os.environ.get(FAULT_FILE)
    if file:
        with contextlib.suppress(UserError):
            write_atomically(Path(file), fault.to_json().encode())
            return
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"{fault.details}paceline: {fault}\n")
