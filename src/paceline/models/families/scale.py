"""Scale: how a family's base plan becomes one of its sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Multipliers of a size."""

    depth: float
    width: float
    max_channels: int

    def channels(self, base: int) -> int:
        """Channels of a layer: bounded, multiplied, rounded up to a multiple of 8."""
        return math.ceil(min(base, self.max_channels) * self.width / 8) * 8

    def repeats(self, base: int) -> int:
        """Blocks in a row, at least one."""
        return max(round(base * self.depth), 1)
