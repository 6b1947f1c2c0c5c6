"""Feeder: packed batches in, drawn batches on the device out, without a moment in which the host waits for the device.

Everything that touches the device happens in the consumer's thread, between its steps: the loader's threads only write
to memory, so a step may be captured as a CUDA graph while they work.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

from paceline.data.device.pack import batch_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    import torch
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.data.device.lanes import Lane, Mark
    from paceline.data.device.pack import DeviceTable, PackedBatch

AHEAD = 2
"""Batches on the device that are drawn, or on their way, before somebody asks for them."""


class Renderer(Protocol):
    """Draws B3HW in [0, 1] from uint8 buffers of sources and masks; `kernel.py` or `reference.py`."""

    def __call__(self, sources: Tensor, masks: Tensor, table: DeviceTable, size: int, dtype: torch.dtype, /) -> Tensor:
        """Start to draw."""


class Feeder:
    """Draws batches in `dtype` in a lane; `resident` has the bytes of all images where they are on the device."""

    def __init__(
        self, lane: Lane, renderer: Renderer, dtype: torch.dtype, resident: Tensor | None = None, ahead: int = AHEAD
    ) -> None:
        self._lane = lane
        self._renderer = renderer
        self._dtype = dtype
        self._resident = resident
        self._ahead = ahead
        self._copying: deque[tuple[Mark, PackedBatch]] = deque()

    def feed(self, coming: Iterator[PackedBatch], ready: Callable[[], bool]) -> Generator[Batch, None, None]:
        """Deliver batches in order; `ready` says whether the next one can be had without waiting.

        At most `ahead` are on the device beside the one that was delivered last.
        """
        started: deque[tuple[Batch, Tensor, Mark]] = deque()
        while True:
            if not started:
                following = next(coming, None)
                if following is None:
                    return
                started.append(self._start(following))
            while len(started) <= self._ahead and ready():
                following = next(coming, None)
                if following is None:
                    break
                started.append(self._start(following))
            batch, memory, drawn = started.popleft()
            self._lane.join(drawn, (batch.images, memory))
            self._let_go()
            del memory  # the batch's own views keep it
            yield batch

    def let_go(self) -> None:
        """Hold no memory, here or on the device, once all that was started is done."""
        self._resident = None
        self._copying.clear()

    def _start(self, packed: PackedBatch) -> tuple[Batch, Tensor, Mark]:
        with self._lane.working():
            memory = self._lane.copy(packed.buffer, packed.used)
            self._copying.append((self._lane.mark(), packed))
            table, targets = packed.opened(memory)
            sources = memory if self._resident is None else self._resident
            images = self._renderer(sources, memory, table, packed.size, self._dtype)
            return batch_of(images, targets), memory, self._lane.mark()

    def _let_go(self) -> None:
        """Give back the host's buffers that have been copied."""
        while self._copying and self._copying[0][0].query():
            self._copying.popleft()
