"""Buffers: the memory that batches are packed into, made up front, page-locked where a GPU copies from it."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_CROP_BYTES_PER_PIXEL = 6
"""Of a picture: the part of its sources that is seen has about 1.3 pixels of three bytes for each of its own."""
_HEAD_BYTES = 64 << 10


def usual_bytes(batch: int, size: int, tiles: int, largest_image_bytes: int) -> int:
    """Bytes that batches of `batch` pictures of `size` px need, but for rare ones; never more than all tiles can."""
    return batch * (min(_CROP_BYTES_PER_PIXEL * size * size, tiles * largest_image_bytes) + _HEAD_BYTES)


class PackBuffers:
    """`count` flat buffers of `num_bytes`; a batch that needs more, or finds none free, gets memory of its own.

    All are made here: no thread locks pages while a step is captured as a graph.
    """

    def __init__(self, num_bytes: int, count: int, *, pinned: bool) -> None:
        self.num_bytes = num_bytes
        self.oversized = 0
        """Batches that found no room so far; they are copied more slowly."""
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=count)
        for _ in range(count):
            memory = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
            self._free.append(memory.numpy())

    def take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return at least so many bytes of any content; a buffer comes back by itself when the array is garbage.

        `torch.from_numpy` keeps the array alive as long as any tensor looks at it. Views made by numpy do not.
        """
        if num_bytes <= self.num_bytes:
            try:
                memory = self._free.pop()
            except IndexError:
                pass
            else:
                lease = memory.view()
                weakref.finalize(lease, self._free.append, memory)
                return lease
        self.oversized += 1
        return np.empty(num_bytes, np.uint8)
