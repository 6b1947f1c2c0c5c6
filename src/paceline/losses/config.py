"""What a user may set about the loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the three parts of the loss."""

    box: float = 7.5
    """Gain of the box overlap part (1 - CIoU)."""
    cls: float = 0.5
    """Gain of the classification part."""
    dfl: float = 1.5
    """Gain of the distribution focal loss of the box sides."""
