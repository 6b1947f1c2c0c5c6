"""Buffers: the memory of batches, taken again once nobody looks at it."""

from __future__ import annotations

import weakref
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Buffers:
    """Uint8 arrays of one shape: fresh ones cost page faults, 0.2 ms per picture of 640 px.

    With `pinned` their memory is page-locked, so that a CUDA device copies from it beside its work. Whoever starts such
    a copy keeps the tensor until the copy is done. It needs a CUDA device; without `pinned` none is looked for.
    """

    def __init__(self, shape: tuple[int, ...], *, num_kept: int, pinned: bool = False) -> None:
        self.shape = shape
        self._pinned = pinned
        self._free: deque[NDArray[np.uint8]] = deque(maxlen=num_kept)

    def take(self) -> NDArray[np.uint8]:
        """Return an array of any content; its memory comes back by itself when the array is garbage.

        `torch.from_numpy` keeps the array alive as long as any tensor looks at it. Views made by numpy do not.
        """
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._make()
        lease = memory.view()
        weakref.finalize(lease, self._free.append, memory)
        return lease

    def _make(self) -> NDArray[np.uint8]:
        if not self._pinned:
            return np.empty(self.shape, np.uint8)
        memory: NDArray[np.uint8] = torch.empty(self.shape, dtype=torch.uint8, pin_memory=True).numpy()
        return memory
