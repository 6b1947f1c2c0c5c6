"""Events: what a training tells of itself, a line of JSON each with the clock's time, the same of either trainer.

A host runs ahead of its GPU: it has launched a step when it tells of it, not finished it. So a clock may stand only at
events that have waited for the device (`settled`): the ends of epochs and of their steps, and steps 1, 2, 4, 8, ... of
the first epoch. Nothing waits within the epochs after it, so these go as fast as they do for a user.

It needs nothing but Python, since each trainer has an environment of its own.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class Events:
    """Appends to a file; a line is there as soon as it was told."""

    def __init__(self, file: Path, standin_s: Callable[[], float] = lambda: 0.0) -> None:
        """`standin_s`: seconds spent so far in the stand-in for torchvision."""
        file.parent.mkdir(parents=True, exist_ok=True)
        self._stream = file.open("a", buffering=1)
        self._standin_s = standin_s
        self._steps = 0
        self._in_first_epoch = True

    def tell(self, kind: str, **values: object) -> None:
        """Write an event with the clock's time."""
        event = {"kind": kind, "time": time.time(), "standin_s": self._standin_s()}
        self._stream.write(json.dumps(event | values) + "\n")

    def step(self) -> None:
        """After every step."""
        self._steps += 1
        waits = self._in_first_epoch and self._steps & (self._steps - 1) == 0
        self.tell("step", **(settled() if waits else {}))

    def trained(self) -> None:
        """After the last step of an epoch, before anything is saved."""
        self.tell("trained", **settled())

    def epoch(self, epoch: int, ap: float | None) -> None:
        """At the end of an epoch, from 1, with the AP50-95 that it was found to have."""
        self.tell("epoch", epoch=epoch, ap=ap, **settled())
        self._in_first_epoch = False


def settled() -> dict[str, object]:
    """Wait for the GPU if one is in use; returns what to tell with the event, its peak memory so far included."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {"settled": True}
    torch.cuda.synchronize()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"settled": True, "gpu_allocated_bytes": allocated, "gpu_reserved_bytes": reserved}
