"""Process: one trial's program, started ahead so that it has loaded everything when its options come.

search                          trial's process
  |  start ------------------->  imports torch, waits at its input
  |  one line of JSON -------->  trains; writes its run folder, then its ending
  |  (its input stays open)      ends by itself; or at once where its input is closed: the search is gone
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.tuning.slots import Slot

_GRACE_S = 5.0


class TrialProcess:
    """A process that takes the options of one run as a line of JSON, and does that run."""

    def __init__(self, command: Sequence[str], slot: Slot) -> None:
        self.slot = slot
        threads = str(len(slot.cores))
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, slot.cores))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the search, which ends its trials itself
            env=os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads},
        )
        self.given_at = 0.0

    @property
    def pid(self) -> int:
        """The process' number."""
        return self._process.pid

    def give(self, options: Mapping[str, Any], folder: Path) -> None:
        """Start the run, whose program writes its output and its ending into `folder`."""
        assert self._process.stdin is not None
        folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"options": dict(options), "folder": str(folder)}) + "\n"
        self.given_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has died; `poll` will say so
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()

    @property
    def seconds(self) -> float:
        """Seconds since the run was given."""
        return time.monotonic() - self.given_at

    def poll(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.poll()

    def end(self) -> None:
        """End the process and all that it has started, and wait for that."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is not None:
                break
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_S)
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
