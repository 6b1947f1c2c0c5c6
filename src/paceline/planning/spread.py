"""A spread: the median of repeated measurements, and how far it can be trusted. Never imports torch.

The interval is that of order statistics: the k-th smallest to the k-th largest sample hold the median with the stated
probability whatever the samples' distribution is, since each sample lies below the median with probability 1/2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A median with the interval that holds the true one with a probability of 95 %, where there are 6 or more."""

    median: float
    low: float
    high: float
    count: int
    """Measurements; of 5 or fewer, the interval is that of all of them and holds less than 95 %."""

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Summarise samples, at least one."""
        assert samples
        ordered = sorted(samples)
        place = _place(len(ordered))
        return cls(median=median(ordered), low=ordered[place], high=ordered[-1 - place], count=len(ordered))

    def times(self, factor: float) -> Spread:
        """Return the same in another unit."""
        assert factor > 0
        return Spread(median=self.median * factor, low=self.low * factor, high=self.high * factor, count=self.count)

    def rate(self, amount: float) -> Spread:
        """Return `amount` per what was measured: images over seconds."""
        assert self.low > 0
        return Spread(median=amount / self.median, low=amount / self.high, high=amount / self.low, count=self.count)

    def over(self, other: Spread) -> Spread:
        """Return the ratio of two that were measured apart from each other: as wide as both intervals make it."""
        assert other.low > 0
        return Spread(
            median=self.median / other.median,
            low=self.low / other.high,
            high=self.high / other.low,
            count=min(self.count, other.count),
        )


def _place(count: int) -> int:
    """Return how many samples to leave out at either end: the most that keep the confidence."""
    left_out, tail = 0, 0.0
    for below in range(count // 2):
        tail += math.comb(count, below) / 2**count
        if 2 * tail > 1 - CONFIDENCE:
            break
        left_out = below
    return left_out
