"""Ready: what a run is made of, as it is decided before its first file is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.commands.device import make_current, place, resolve_device
from paceline.commands.kernels import try_kernels
from paceline.commands.run_batch import batch_of, require_statistics
from paceline.commands.run_data import RunData, splits
from paceline.commands.step_choice import RunStep
from paceline.commands.weights import load_network, require_model
from paceline.data.dataset import open_data_set
from paceline.losses.detection import DetectionLoss
from paceline.parallel.build import Ranks, num_ranks
from paceline.parallel.fingerprint import digest_of, digest_of_package
from paceline.parallel.layout import Layout
from paceline.training.budget import parse_duration
from paceline.training.choice import StepChoice

if TYPE_CHECKING:
    from paceline.data.user_transform import UserTransform
    from paceline.options import TrainOptions
    from paceline.parallel.process_group import ProcessGroup
    from paceline.records import RunFolder

MAY_DIFFER = frozenset({"model", "data", "project", "name", "exist_ok", "resume", "device", "workers", "cache"})
"""Options that may differ between ranks: places, and how a host does its part. Data are compared by what they hold."""


class Ready:
    """Data, network, batch, layout and step of a run, the same on all its ranks."""

    def __init__(
        self,
        options: TrainOptions,
        *,
        resumed: RunFolder | None,
        group: ProcessGroup,
        transform: UserTransform | None,
    ) -> None:
        """Decide all of it, in an order in which mistakes are said as early as they can be known.

        resumed: the folder of the run that goes on. Raises UserError for whatever the user can mend.
        """
        self.group = group
        self.resumed = resumed
        require_model(options.model)
        rank = group.rank
        named = resolve_device(options.loop.device, local_rank=rank.local_rank, local_world=rank.local_world)
        self.device = make_current(named)
        compared = {name: value for name, value in options.to_flat().items() if name not in MAY_DIFFER}
        group.agree("start", {"code": digest_of_package(), "options": digest_of(compared)})
        self.limit_s = parse_duration(options.loop.time) if options.loop.time else None
        torch.manual_seed(options.loop.seed)
        group.report(0, "index")
        with group.first_on_node("index"):
            self.data_set = open_data_set(options.data, seed=options.loop.seed)
        group.report(0, "start")
        self.train_index, self.val_index = splits(self.data_set)
        group.agree("data", {"data": f"{self.train_index.digest()} {self.val_index.digest()}"})
        self.loaded = load_network(options.model, self.data_set.names, pretrained=options.loop.pretrained)
        place(self.loaded.network, self.device)
        network = self.loaded.network
        criterion = DetectionLoss(
            options.loss, num_classes=network.num_classes, reg_max=network.reg_max, strides=network.strides
        )
        try_kernels(network, criterion, options.loop.amp, group)
        self.sized = batch_of(
            options,
            network,
            criterion,
            self.train_index,
            self.val_index,
            device=self.device,
            rank=rank,
        )
        self.options = options = self.sized.settled(options)
        self.batch = self.sized.images
        layout = Layout.of(options.parallel, devices=num_ranks(), batch=self.batch, nodes=len(network.nodes))
        require_statistics(options, self.batch // (layout.replicas * layout.microbatches) * layout.norm_ranks)
        self.ranks = Ranks(layout, self.device)
        done = 0 if resumed is None else max((line["epoch"] for line in resumed.records("epoch")), default=0)
        self.step = RunStep(
            options,
            self.loaded,
            self.train_index,
            criterion=criterion,
            layout=layout,
            batch=self.batch,
            device=self.device,
            local_world=rank.local_world,
            epochs_done=done,
            limit_s=self.limit_s,
        )
        self.choice = StepChoice.from_json(group.share("step", lambda: self.step.choose().to_json()))
        self.data = RunData(
            options,
            self.train_index,
            self.val_index,
            batch=self.batch,
            ranks=self.ranks,
            device=self.device,
            local_world=rank.local_world,
            transform=transform,
        )
