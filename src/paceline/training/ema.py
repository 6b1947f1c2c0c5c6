"""The moving average of the weights, which is what gets evaluated and kept."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING

import torch

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
        self._counts = [pair for pair in pairs if not pair[1].is_floating_point()]

    def decay(self, updates: int) -> float:
        """Weight of the past after this many updates."""
        return self._decay * (1 - math.exp(-updates / self._ramp_updates))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the network's present values."""
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._values, 1 - self.decay(self.updates))
        for average, value in self._counts:
            average.copy_(value)


def _tensors(network: Module) -> list[Tensor]:
    return [*(local(parameter.data) for parameter in network.parameters()), *network.buffers()]
