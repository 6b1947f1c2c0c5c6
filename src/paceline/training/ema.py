"""The moving average of the weights, which is what gets evaluated and kept."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch

from paceline.lists import Walks, approach, copy_numbers
from paceline.parallel.shards import local

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


class Ema:
    """Average of parameters and floating-point buffers: average += (1 - d) (value - average), d = decay(updates).

    d = 0.9999 (1 - exp(-updates / 2000)): at first the average follows closely, later it remembers long.
    """

    def __init__(
        self, network: Module, *, average: Module | None = None, decay: float = 0.9999, ramp_updates: float = 2000.0
    ) -> None:
        """Start with the network's values; `average` is a second network that has them, None to copy the first."""
        self.network = (average or copy.deepcopy(network)).eval().requires_grad_(requires_grad=False)
        self.updates = 0
        self._decay = decay
        self._ramp_updates = ramp_updates
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        self._averages = [average for average, value in pairs if value.is_floating_point()]
        self._values = [value for _, value in pairs if value.is_floating_point()]
        self._average_counts = [average for average, value in pairs if not value.is_floating_point()]
        self._counts = [value for _, value in pairs if not value.is_floating_point()]
        # One operation walks through both in the order of memory.
        assert all(average.stride() == value.stride() for average, value in pairs)
        self._walks, self._count_walks = Walks(), Walks(torch.int64)
        self._share = torch.zeros((), dtype=torch.float32, device=pairs[0][1].device)
        """What the next update takes of the network's values."""

    def decay(self, updates: int) -> float:
        """Weight of the past after this many updates."""
        return self._decay * (1 - math.exp(-updates / self._ramp_updates))

    def update(self) -> None:
        """Take in the network's present values."""
        self.advance()
        self.take_in()

    def advance(self) -> None:
        """Count an update, and tell the device what it takes of the values."""
        self.updates += 1
        self._share.fill_(1 - self.decay(self.updates))

    @torch.no_grad()
    def take_in(self) -> None:
        """Take in the network's present values, as `advance` has said; the device's part of an update."""
        walk = self._walks.over(self._averages, self._values)
        if walk is not None:
            approach(walk, self._share)
        else:
            self._take_in_by_torch()
        walk = self._count_walks.over(self._average_counts, self._counts)
        if walk is not None:
            copy_numbers(walk)
        elif self._counts:
            torch._foreach_copy_(self._average_counts, self._counts)

    def _take_in_by_torch(self) -> None:
        # A fused SGD of rate s that walks uphill by `values`, with a weight decay of 1: a - s (1 a - v).
        torch._fused_sgd_(
            self._averages,
            self._values,
            [],
            weight_decay=1.0,
            momentum=0.0,
            lr=self._share,
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
        )


def _tensors(network: Module) -> list[Tensor]:
    return [*(local(parameter.data) for parameter in network.parameters()), *network.buffers()]
