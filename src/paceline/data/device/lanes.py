"""Lanes: how packed batches reach a device: on CUDA by a stream of its own beside the training's, on a CPU not at all.

side stream      copy k | draw k | copy k+1 | draw k+1 | ...
training         wait for "draw k" | step k      | wait for "draw k+1" | step k+1
host's buffer    free again after "copy k"
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol

import torch

from paceline.streams import stream_for

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor


class Mark(Protocol):
    """A place in the lane that the device passes at some time."""

    def query(self) -> bool:
        """Whether it has passed."""


class Lane(Protocol):
    """Takes work for the device without waiting for it; only the consumer's thread calls it."""

    def working(self) -> AbstractContextManager[object]:
        """Run what is started inside in this lane."""

    def copy(self, buffer: NDArray[np.uint8], used: int) -> Tensor:
        """Start to copy the first bytes of a buffer, which stays untouched until the next mark is passed."""

    def mark(self) -> Mark:
        """Mark the place behind all that was started so far."""

    def join(self, mark: Mark, tensors: Iterable[Tensor]) -> None:
        """Let the training's stream wait for a mark, and keep the tensors' memory as long as it works with them."""


class CudaLane:
    """The stream beside the one that trains; lanes to one device share it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = stream_for("lane", device)

    def working(self) -> AbstractContextManager[object]:
        """Run what is started inside in the side stream."""
        return torch.cuda.stream(self._stream)

    def copy(self, buffer: NDArray[np.uint8], used: int) -> Tensor:
        """Start to copy; memory on the device belongs to the side stream."""
        with self.working():
            return torch.from_numpy(buffer)[:used].to(self._device, non_blocking=True)

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def join(self, mark: Mark, tensors: Iterable[Tensor]) -> None:
        """Let the current stream wait for an event."""
        assert isinstance(mark, torch.cuda.Event)
        current = torch.cuda.current_stream(self._device)
        current.wait_event(mark)
        for tensor in tensors:
            tensor.record_stream(current)


class Passed:
    """A mark that has been passed."""

    def query(self) -> bool:
        """Say so."""
        return True


class HostLane:
    """The device is the host: nothing is copied, all is done at once."""

    def working(self) -> AbstractContextManager[object]:
        """Run it here."""
        return nullcontext()

    def copy(self, buffer: NDArray[np.uint8], used: int) -> Tensor:
        """Look at the buffer itself."""
        return torch.from_numpy(buffer)[:used]

    def mark(self) -> Passed:
        """Return a mark that has been passed."""
        return Passed()

    def join(self, mark: Mark, tensors: Iterable[Tensor]) -> None:
        """Do nothing: there is nothing to wait for."""


def lane_of(device: torch.device) -> Lane:
    """Return the lane to a device."""
    return CudaLane(device) if device.type == "cuda" else HostLane()
