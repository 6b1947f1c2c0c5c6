"""The schedule: learning rates and momentum as a pure function of how far the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.training.config import OptimConfig
    from paceline.training.optim import OptimPlan
    from paceline.training.optimizer import Optimizer


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the optimiser is to use for one step."""

    lr: float
    bias_lr: float
    momentum: float


@dataclass(frozen=True, kw_only=True)
class Schedule:
    r"""Warm-up, then linear or cosine decay to `lrf` of the first rate.

    ```
    lr0 |   /\
        |  /  \____
        | /        \____
        |/              \____  lr0 x lrf
        +--|-------------------> epochs
        warm-up
    ```
    """

    plan: OptimPlan
    lrf: float
    cosine: bool
    warmup_epochs: float
    nominal_accumulation: int

    @classmethod
    def from_config(cls, config: OptimConfig, plan: OptimPlan, *, batch: int, steps_per_epoch: float) -> Schedule:
        """Build from the options.

        batch: images per step over all devices.
        steps_per_epoch: used to warm up over at least 100 steps, since an epoch of a small set is only a few.
        """
        at_least = 100 / steps_per_epoch if config.warmup_epochs > 0 else 0.0
        return cls(
            plan=plan,
            lrf=config.lrf,
            cosine=config.cos_lr,
            warmup_epochs=max(config.warmup_epochs, at_least),
            nominal_accumulation=max(round(config.nbs / batch), 1),
        )

    def decay(self, progress: float) -> float:
        """Share of the first rate that is left at `progress` (0 at the start of the run, 1 at its end)."""
        progress = min(max(progress, 0.0), 1.0)
        if self.cosine:
            return self.lrf + (1 - self.lrf) * (1 + math.cos(math.pi * progress)) / 2
        return 1 - (1 - self.lrf) * progress

    def warmth(self, epoch: float) -> float:
        """How far the warm-up is, from 0 to 1, after `epoch` epochs (a fraction counts)."""
        return min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs > 0 else 1.0

    def rates(self, epoch: float, epochs: float) -> Rates:
        """Rates after `epoch` of `epochs` epochs."""
        warmth = self.warmth(epoch)
        target = self.plan.lr0 * self.decay(epoch / epochs)
        return Rates(
            lr=target * warmth,
            bias_lr=self.plan.warmup_bias_lr + (target - self.plan.warmup_bias_lr) * warmth,
            momentum=self.plan.warmup_momentum + (self.plan.momentum - self.plan.warmup_momentum) * warmth,
        )

    def accumulation(self, epoch: float) -> int:
        """Batches per update: from 1 at the start of the warm-up to the nominal number at its end."""
        return max(round(1 + (self.nominal_accumulation - 1) * self.warmth(epoch)), 1)


def apply_rates(optimizer: Optimizer, rates: Rates) -> None:
    """Write the rates into the tensors of the optimiser's groups.

    The momentum of AdamW is not among them: no plan changes it on the way.
    """
    for group in optimizer.param_groups:
        group["lr"].fill_(rates.bias_lr if group["name"] == "bias" else rates.lr)
        if "momentum" in group:
            group["momentum"].fill_(rates.momentum)
