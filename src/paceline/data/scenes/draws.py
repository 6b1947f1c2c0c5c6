"""Draws: one scene's random numbers, taken one after the other from the hashes of its address."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from paceline.data.draws import hashed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

T = TypeVar("T")

_BLOCK = 256
"""Words that are hashed at once."""


class Draws:
    """A stream of numbers that hangs on its two keys alone, so any thread and any version of numpy draws the same."""

    def __init__(self, first: int, second: int) -> None:
        self._keys = (first, second)
        self._slot = 0
        self._words: list[int] = []

    def _hashes(self, count: int) -> NDArray[np.uint64]:
        """Return the next words of the stream."""
        words = hashed(*self._keys, np.arange(self._slot, self._slot + count))
        self._slot += count
        return words

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw from [low, high)."""
        if not self._words:
            self._words = self._hashes(_BLOCK)[::-1].tolist()
        return low + (high - low) * ((self._words.pop() >> 11) * 2.0**-53)

    def integer(self, low: int, high: int) -> int:
        """Draw a whole number from low to high, both included."""
        return min(low + int(self.uniform() * (high - low + 1)), high)

    def chance(self, probability: float) -> bool:
        """Draw True with this probability."""
        return self.uniform() < probability

    def pick(self, entries: Sequence[T]) -> T:
        """Draw one of the entries."""
        return entries[self.integer(0, len(entries) - 1)]

    def shuffled(self, entries: Sequence[T]) -> list[T]:
        """Draw an order of the entries."""
        rest = list(entries)
        return [rest.pop(self.integer(0, len(rest) - 1)) for _ in entries]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """Draw an array of whole numbers from 0 to 255."""
        count = math.prod(shape)
        words = self._hashes(-(-count // 8)).astype("<u8")
        return words.view(np.uint8)[:count].reshape(shape)
