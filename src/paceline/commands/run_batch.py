"""The batch of a run: as it was asked for, as the data set allows, or as it was measured."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.commands.memory import Fitted, FittingBatch
from paceline.data.sizes import sizes_of
from paceline.errors import UserError
from paceline.option_values import AUTO_BATCH, STRIDE
from paceline.parallel.build import num_ranks
from paceline.parallel.gather import from_first
from paceline.training.machine import Machine
from paceline.training.precision import precisions
from paceline.training.recipe import Recipe
from paceline.training.understudy import Cast

if TYPE_CHECKING:
    import torch

    from paceline.data.index import Index
    from paceline.losses.detection import DetectionLoss
    from paceline.models.graph import DetectionModel
    from paceline.options import TrainOptions
    from paceline.parallel.rank import Rank
    from paceline.training.optim import OptimPlan
    from paceline.training.precision import Amp

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class RunBatch:
    """Images per step over all ranks, and what follows from how they were found."""

    images: int
    asked: int
    """What the options are to name: a number also where they said `auto`, so that a run that goes on takes the same."""
    amp: Amp
    """The precision that was asked for, or that the batch was measured in."""
    fitted: Fitted | None
    """The measurement, where there was one."""

    def settled(self, options: TrainOptions) -> TrainOptions:
        """Put the number into the options, and the precision that it holds in."""
        return dataclasses.replace(
            options,
            data=dataclasses.replace(options.data, batch=self.asked),
            loop=dataclasses.replace(options.loop, amp=self.amp),
        )


def batch_of(
    options: TrainOptions,
    network: DetectionModel,
    criterion: DetectionLoss,
    train_index: Index,
    val_index: Index,
    *,
    device: torch.device,
    rank: Rank,
) -> RunBatch:
    """Find the batch; `batch=auto` is measured on copies of the network, on every rank."""
    asked, amp, fitted = options.data.batch, options.loop.amp, None
    if asked == AUTO_BATCH:
        cast = Cast(
            network=network,
            criterion=criterion,
            optimizer=_optimizer(options, len(train_index), network.num_classes),
            freeze=options.loop.freeze,
            clip=options.optim.clip,
        )
        precision = from_first(precisions(amp, Machine.of(device), device)[0])
        fitted = FittingBatch(
            cast=cast,
            precision=precision,
            data=options.data,
            augment=options.augment,
            train_index=train_index,
            val_index=val_index,
            device=device,
            rank=rank,
            nbs=options.optim.nbs,
            beside=options.loop.val_async,
        ).find()
        asked = fitted.batch
        amp = "off" if precision.name == "fp32" else precision.name  # it holds in the precision it was measured in
    available, ranks = len(train_index), num_ranks()
    images = asked
    if asked > available:  # it would only repeat its images within one step
        log.warning("batch=%d is more than the %d training images; the batch is %d.", asked, available, available)
        images = max(available // ranks, 1) * ranks
    return RunBatch(images=images, asked=asked, amp=amp, fitted=fitted)


def _optimizer(options: TrainOptions, num_images: int, num_classes: int) -> OptimPlan:
    """Plan the optimiser as for the nominal batch: the number of updates hardly changes what it takes of memory."""
    recipe = Recipe.of(
        options.optim,
        num_images=num_images,
        num_classes=num_classes,
        batch=options.optim.nbs,
        epochs=options.loop.epochs,
    )
    return recipe.plan


def require_statistics(options: TrainOptions, images: int) -> None:
    """Raise UserError where a batch norm would see a single value per channel, which has no variance."""
    least_px = sizes_of(options.data.imgsz, options.augment.multi_scale)[0]
    if images == 1 and least_px == STRIDE:
        raise UserError(
            f"One picture of {least_px} px at a time leaves batch norms a single value, which has no variance; take "
            f"batch=2 or more, or pictures of {2 * STRIDE} px or more."
        )
