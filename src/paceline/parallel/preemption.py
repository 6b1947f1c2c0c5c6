"""Preemption: a signal asks a run to stop, and all ranks agree on the step after which they do.

```
rank   step   n          n + k
0      .. note(n) ...... wait for all notes of n: did anybody want to stop? ..
1      .. SIGTERM, note(n, stop) ....... the same answer at the same step ....
```

A note goes to the store and not through a collective, so it neither waits for a device nor gets between an engine's
collectives; the answer is read k steps later, when it is long there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from paceline.parallel.store import await_count

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from torch._C._distributed_c10d import Store

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to stop: a job scheduler's end, and Slurm's `--signal=USR1@120`."""
EVERY = 8
"""Steps between two notes."""
PATIENCE_S = 10.0
"""A signal that comes again after this time has its usual effect; before, a scheduler and torchrun both sent it on."""


class Preemption:
    """Whether this run was asked to stop; installed as the handler of the signals that ask."""

    def __init__(self, store: Store | None = None, *, rank: int = 0, world: int = 1, every: int = EVERY) -> None:
        self._store = store
        self._rank = rank
        self._world = world
        self._every = every
        self._noted: int | None = None
        self._stops = False
        self._before: dict[int, Any] = {}
        self.asked_at: float | None = None
        """Monotonic second of the first signal in this process."""
        self.is_heeded = False
        """Whether somebody asks `agreed`, so that a signal needs no other answer."""

    def ask(self) -> None:
        """Ask the run to stop, as a signal does."""
        if self.asked_at is None:
            self.asked_at = time.monotonic()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals while the body runs; only the main thread can, elsewhere nothing happens."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Whether all ranks stop after this step; every rank asks after every step, and gets the same answer."""
        self.is_heeded = True
        if self._store is None:
            return self.asked_at is not None
        if step % self._every or self._stops:
            return self._stops
        if self._noted is not None:
            self._stops = self._read(self._noted)
        self._note(step)
        return self._stops

    def _note(self, step: int) -> None:
        assert self._store is not None
        if self.asked_at is not None:
            self._store.add(f"stop/{step}/asked", 1)
        self._store.add(f"stop/{step}/notes", 1)
        self._noted = step

    def _read(self, step: int) -> bool:
        store = self._store
        assert store is not None
        await_count(store, f"stop/{step}/notes", self._world, soon=True)  # a rank may lag
        asked = store.add(f"stop/{step}/asked", 0) > 0
        if self._rank == 0 and step >= 2 * self._every:
            with contextlib.suppress(RuntimeError):  # everybody has read the notes before last
                for kind in ("notes", "asked"):
                    store.delete_key(f"stop/{step - 2 * self._every}/{kind}")
        return asked

    def _handle(self, number: int, frame: FrameType | None) -> None:
        alone_and_deaf = self._store is None and not self.is_heeded
        impatient = self.asked_at is not None and time.monotonic() - self.asked_at > PATIENCE_S
        if alone_and_deaf or impatient:
            signal.signal(number, self._before[number])
            os.kill(os.getpid(), number)
            return
        self.ask()
