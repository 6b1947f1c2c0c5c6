"""Optimizer: changes parameters by their gradients, with rates and state on the device, changed in place.

torch.optim's base class does this too, but loads torch's compiler when the first optimiser is made: more than a second
of the start of every run (docs/decisions/0059).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch

from paceline.lists import Walks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor


class Optimizer(ABC):
    """Parameters in groups that share their rates; what is derived from it says how they change."""

    found_inf: Tensor | None = None
    """0-dim float32: 1.0 leaves the update out, without the host knowing; None always updates."""

    def __init__(self, groups: Iterable[Mapping[str, Any]], **defaults: Any) -> None:
        """Take groups of `params` with settings of their own, which go before the `defaults`."""
        self.param_groups: list[dict[str, Any]] = [defaults | dict(group) for group in groups]
        self.state: dict[Tensor, dict[str, Tensor]] = {}
        """Tensors of each parameter, by name, there from the start."""
        self._walks = Walks()

    def step(self) -> None:
        """Apply the gradients; parameters that have none stay."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                with torch.no_grad():
                    self._apply(group, parameters)

    def zero_grad(self) -> None:
        """Let go of the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _left_out(self, lr: Tensor) -> Tensor:
        """Return what says whether an update is left out, beside a rate."""
        return torch.zeros_like(lr) if self.found_inf is None else self.found_inf

    @abstractmethod
    def _apply(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Change the parameters of a group that have a gradient."""


def rates_on_device(group: dict[str, Any], *names: str) -> None:
    """Turn numbers of an optimiser's group into 0-dim float32 tensors beside its parameters."""
    device = group["params"][0].device
    for name in names:
        group[name] = torch.full((), float(group[name]), dtype=torch.float32, device=device)
