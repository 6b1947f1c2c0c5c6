"""The loss scale: keeps gradients within the range of float16, without the host ever looking at them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

GROWTH_UPDATES = 2000


class LossScale:
    """A factor on the losses before backward, taken out of the gradients afterwards.

    An update whose gradient is not finite halves it, `growth_updates` finite ones in a row double it
    (arXiv 1710.03740, section 3.2); a scale that is not adaptive stays as it is. All on the device, always in the same
    places in memory.
    """

    def __init__(
        self, start: float, device: torch.device, *, adaptive: bool, growth_updates: int = GROWTH_UPDATES
    ) -> None:
        self.value = torch.tensor(start, device=device)
        self.adaptive = adaptive
        self._growth_updates = growth_updates
        self._finite_updates = torch.zeros((), device=device)

    def update(self, not_finite: Tensor) -> None:
        """Take in whether the last gradient was finite (0.0) or not (1.0)."""
        if not self.adaptive:
            return
        failed = not_finite > 0
        run = torch.where(failed, torch.zeros_like(self._finite_updates), self._finite_updates + 1)
        grown = run >= self._growth_updates
        self.value.copy_(torch.where(failed, self.value / 2, torch.where(grown, self.value * 2, self.value)))
        self._finite_updates.copy_(torch.where(grown, torch.zeros_like(run), run))

    def saved(self) -> dict[str, Tensor]:
        """Return copies for a checkpoint; empty where it stays as it is."""
        if not self.adaptive:
            return {}
        return {"loss_scale": self.value.clone(), "finite_updates": self._finite_updates.clone()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `saved` gave, in place; where it stays as it is, or there is nothing, do nothing."""
        if self.adaptive and "loss_scale" in tensors:
            self.value.copy_(tensors["loss_scale"])
            self._finite_updates.copy_(tensors.get("finite_updates", torch.zeros(())))

    def state(self) -> list[Tensor]:
        """Return every tensor that changes in place."""
        return [self.value, self._finite_updates]
