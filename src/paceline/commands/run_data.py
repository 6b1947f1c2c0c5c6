"""The data of a run: its splits, and the loaders of this rank's share of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.commands.channels_first import ChannelsFirst
from paceline.data.device.choice import choose_training_data
from paceline.data.loader import EvalLoader, TrainLoader, num_threads
from paceline.errors import UserError
from paceline.parallel.gather import from_first, of_all

if TYPE_CHECKING:
    from paceline.data.dataset import DataSet
    from paceline.data.index import Index
    from paceline.data.user_transform import UserTransform
    from paceline.options import TrainOptions
    from paceline.parallel.build import Ranks
    from paceline.training.loop import TrainingData
    from paceline.training.plan import StepPlan


def splits(data_set: DataSet) -> tuple[Index, Index]:
    """Return what is trained on and what is evaluated on; raises UserError where there is nothing to train on."""
    if data_set.train is None or len(data_set.train) == 0:
        raise UserError(f"{data_set.source} has no training images; add a `train` entry to it.")
    assert data_set.val is not None, "a set without a val split is split when it is opened"
    return data_set.train, data_set.val


@dataclass(frozen=True)
class RunData:
    """What the loaders of a run are made of; each is to be closed by whoever asks for it."""

    options: TrainOptions
    train_index: Index
    val_index: Index
    _: dataclasses.KW_ONLY
    batch: int
    """Images per step over all ranks."""
    ranks: Ranks
    device: torch.device
    local_world: int
    """Ranks on this machine."""
    transform: UserTransform | None = None

    def train_loader(self) -> TrainLoader:
        """Open the loader of this replica's share of every batch."""
        data = dataclasses.replace(self.options.data, batch=self.batch, workers=self._num_workers)
        on_device = data.render == "device" or (data.render == "auto" and self.device.type == "cuda")
        return TrainLoader(
            self.train_index,
            data,
            self.options.augment,
            seed=self.options.loop.seed,
            rank=self.ranks.replica,
            world=self.ranks.layout.replicas,
            on_device=on_device,
            transform=self.transform,
        )

    def on_device(self, loader: TrainLoader, plan: StepPlan) -> TrainingData:
        """Choose who renders, host or device, and return the batches as they then come, laid out as planned."""
        data = self.options.data
        source = choose_training_data(
            loader,
            data.render,
            self.device,
            plan.precision.amp_dtype or torch.float32,
            upload=data.cache == "device",
            decode=data.decode,
            sharing=self.local_world,
            agree=from_first,
            gather=of_all,
        )
        return source if plan.channels_last else ChannelsFirst(source)

    def eval_loader(self) -> EvalLoader:
        """Open the loader of this rank's share of the evaluation.

        Beside a training that goes on it takes half the threads, so that the training's batches come first.
        """
        data, workers = self.options.data, self._num_workers
        rank, world = self.ranks.evaluation_share
        return EvalLoader(
            self.val_index,
            data.imgsz,
            batch=self.batch,
            workers=max(workers // 2, 1) if self.options.loop.val_async else workers,
            cache=data.cache,
            rank=rank,
            world=world,
            rect=data.rect,
        )

    @property
    def _num_workers(self) -> int:
        return num_threads(self.options.data.workers, self.local_world)
