"""The recipe: what the options and the size of the data make of optimiser and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.training.optim import OptimPlan, plan_optimizer
from paceline.training.schedule import Schedule

if TYPE_CHECKING:
    from paceline.training.config import OptimConfig


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything about the updates that is fixed before the first step."""

    plan: OptimPlan
    schedule: Schedule

    @classmethod
    def of(cls, config: OptimConfig, *, num_images: int, num_classes: int, batch: int, epochs: int) -> Recipe:
        """Decide from the options and the data; the same on every rank.

        batch: images per step over all devices.
        """
        steps_per_epoch = num_images / batch
        accumulation = max(round(config.nbs / batch), 1)
        plan = plan_optimizer(
            config,
            num_classes=num_classes,
            updates=math.ceil(num_images / max(batch, config.nbs)) * epochs,
            effective_batch=batch * accumulation,
        )
        schedule = Schedule.from_config(config, plan, batch=batch, steps_per_epoch=steps_per_epoch)
        return cls(plan=plan, schedule=schedule)
