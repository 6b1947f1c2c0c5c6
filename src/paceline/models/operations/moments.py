"""Moments: mean, and sum of squares around it, of each channel of a map, by parts of its cells.

A batch norm takes them from the convolution before it, where a kernel of ours has summed them up on the way
(`moment_kernels.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.operations.handover import Handover


@dataclass(frozen=True)
class Moments:
    """The moments of a map of so many channels; its parts have cells, or weigh nothing."""

    table: Tensor
    """Float32, flat: means P C, sums of squares around them P C, numbers of cells P."""
    num_channels: int
    handover: Handover | None = None
    """Where a norm of the map may leave its gradient unwritten."""

    @classmethod
    def empty(cls, like: Tensor, num_parts: int, num_channels: int, handover: Handover | None = None) -> Moments:
        """Return room for those of so many parts, on a tensor's device."""
        return cls(like.new_empty(num_parts * (2 * num_channels + 1), dtype=torch.float32), num_channels, handover)

    @property
    def num_parts(self) -> int:
        """Into which the cells of the map are cut."""
        return self.table.numel() // (2 * self.num_channels + 1)

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mean C and variance C of all cells, uncorrected, and their number, 1."""
        sizes = [self.num_parts * self.num_channels] * 2 + [self.num_parts]
        means, spreads, counts = torch.split(self.table, sizes)
        means, spreads = means.view(-1, self.num_channels), spreads.view(-1, self.num_channels)
        total = counts.sum(0, keepdim=True)
        shares = (counts / total)[:, None]
        mean = means[0] + ((means - means[0]) * shares).sum(0)
        variance = spreads.sum(0) / total + ((means - mean).square() * shares).sum(0)
        return mean, variance, total


@dataclass
class Tally:
    """A place where a convolution leaves the moments of its result, if it has them."""

    moments: Moments | None = None
