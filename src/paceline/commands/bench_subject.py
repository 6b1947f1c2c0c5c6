"""The subject of a bench: a network with its plan, and the steps and batches that are made of it, as training does."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from paceline.commands.bench_data import DataBench
from paceline.commands.bench_step import StepBench
from paceline.commands.device import place
from paceline.commands.kernels import try_kernels
from paceline.commands.run_data import RunData, splits
from paceline.commands.step_choice import RunStep
from paceline.commands.weights import find_weights, load_network
from paceline.data.dataset import open_data_set
from paceline.errors import UserError
from paceline.losses.detection import DetectionLoss
from paceline.option_values import STRIDE
from paceline.options import TrainOptions
from paceline.parallel.build import Ranks, num_ranks
from paceline.parallel.config import ParallelConfig
from paceline.parallel.layout import Layout
from paceline.parallel.micro import MicroBatches
from paceline.parallel.single import SingleEngine
from paceline.planning.noise import BOXES, noise_batch
from paceline.training.choice import StepChoice
from paceline.training.compiling import compiles_loss
from paceline.training.graphed import CudaCapture
from paceline.training.plan import laid_out

if TYPE_CHECKING:
    from paceline.batch import Batch
    from paceline.commands.weights import LoadedNetwork
    from paceline.data.dataset import DataSet
    from paceline.data.index import Index
    from paceline.ledger import Ledger
    from paceline.models.graph import DetectionModel
    from paceline.options import BenchOptions
    from paceline.parallel.engine import Criterion, Engine
    from paceline.parallel.process_group import ProcessGroup
    from paceline.training.compiling import Compiler

LONG_RUN = (100, 118_287)
"""Epochs and images of the training that the step is chosen for: COCO's, long enough for anything to pay."""
CLASSES = 80
"""Of the network where neither weights nor a data set say how many."""
_SHARED = ("data", "imgsz", "batch", "workers", "cache", "amp", "tune_step")
"""Options that mean what they mean in training."""


class BenchSubject:
    """What is measured, put together once."""

    def __init__(self, options: BenchOptions, group: ProcessGroup, device: torch.device) -> None:
        """Open the data set, load the network, choose the plan; all ranks come here."""
        self._options = options
        self._group = group
        self.device = device
        torch.manual_seed(0)
        self._data_set: DataSet | None = None
        self._indexes: tuple[Index, Index] | None = None
        if options.bench.data:
            with group.first_on_node("index"):
                self._data_set = open_data_set(self._train_options.data, seed=0)
            self._indexes = splits(self._data_set)
            self._require_batch(len(self._indexes[0]))
        self.loaded = self.network()
        criterion = self._criterion(self.loaded.network)
        try_kernels(self.loaded.network, criterion, self._train_options.loop.amp, group)
        self.layout = layout_of(options, num_ranks())
        self._ranks = Ranks(self.layout, device)
        self.share = options.bench.batch // self.layout.replicas
        self._step = RunStep(
            self._train_options,
            self.loaded,
            self._indexes[0] if self._indexes is not None else cast("Index", _Counts()),
            criterion=criterion,
            layout=self.layout,
            batch=options.bench.batch,
            device=device,
            local_world=group.rank.local_world,
        )
        self.plan = StepChoice.from_json(group.share("step", lambda: self._step.choose().to_json())).plan
        self.precision = self.plan.precision
        self._step.compile_ahead(self.plan, group)

    def network(self) -> LoadedNetwork:
        """Load the network onto the device, for the classes of the data set, of the weights, or those asked for."""
        names: tuple[str, ...] | None = None
        if self._data_set is not None:
            names = self._data_set.names
        elif find_weights(self._options.model) is None:
            names = tuple(str(number) for number in range(self._options.bench.num_classes or CLASSES))
        loaded = load_network(self._options.model, names)
        place(loaded.network, self.device)
        return loaded

    def compiler(self) -> Compiler | None:
        """Make what compiles, to be opened; None where nothing is to be compiled."""
        return self._step.compiler(self.plan, keeps=self._group.rank.is_main) if self.plan.compile else None

    def step(self, batch: Batch, compiler: Compiler | None) -> StepBench:
        """Make the step of this rank, which exchanges gradients with the others."""
        return self._step_of(self.loaded.network, batch, compiler, self._ranks)

    def step_alone(self, batch: Batch, compiler: Compiler | None) -> StepBench:
        """Make a step of the same share of the batch on a network of its own, which exchanges nothing."""
        return self._step_of(self.network().network, batch, compiler, None)

    def data(self) -> DataBench | None:
        """Open the batches of the data set, to be closed; None where none is named."""
        if self._data_set is None or self._indexes is None:
            return None
        train_index, val_index = self._indexes
        run_data = RunData(
            self._train_options,
            train_index,
            val_index,
            batch=self._options.bench.batch,
            ranks=self._ranks,
            device=self.device,
            local_world=self._group.rank.local_world,
        )
        return DataBench(run_data, self.plan, self.device, str(self._data_set.source))

    def noise(self) -> Batch:
        """Make a batch as it would come: drawn by the device on a GPU, by the host elsewhere."""
        drawn_as = (self.precision.amp_dtype or torch.float32) if self.device.type == "cuda" else None
        classes = self.loaded.network.num_classes
        batch = noise_batch(self.share, self._options.bench.imgsz, classes, dtype=drawn_as, device=self.device)
        return batch if self.plan.channels_last else batch.channels_first()

    @property
    def _train_options(self) -> TrainOptions:
        """Options of the training that this stands for: as many epochs as make it a long one."""
        named = {name: getattr(self._options.bench, name) for name in _SHARED}
        images = len(self._indexes[0]) if self._indexes is not None else LONG_RUN[1]
        epochs = max(math.prod(LONG_RUN) // images, 1)
        return TrainOptions.from_flat({"model": self._options.model, "epochs": epochs, **named})

    def _require_batch(self, images: int) -> None:
        batch, data = self._options.bench.batch, self._options.bench.data
        if batch > images:
            raise UserError(
                f"batch={batch} is more than the {images} training images of {data}; take a smaller batch, or a larger "
                "set."
            )

    def _step_of(
        self, network: DetectionModel, batch: Batch, compiler: Compiler | None, ranks: Ranks | None
    ) -> StepBench:
        laid_out(network, channels_last=self.plan.channels_last)
        return StepBench(
            partial(self._engine, network, compiler, ranks),
            batch,
            self.device,
            capture=CudaCapture(self.device) if self.plan.graphs else None,
            prepare=None if compiler is None else partial(compiler.compile_network, network),
        )

    def _criterion(self, network: DetectionModel) -> DetectionLoss:
        return DetectionLoss(
            TrainOptions().loss, num_classes=network.num_classes, reg_max=network.reg_max, strides=network.strides
        )

    def _engine(
        self, network: DetectionModel, compiler: Compiler | None, ranks: Ranks | None, ledger: Ledger
    ) -> Engine:
        """Build the trainer's engine; one that runs out of memory is to say so, not to go on in micro-batches."""
        criterion: Criterion = self._criterion(network)
        if compiler is not None and compiles_loss(self.device):
            criterion = compiler.compile_criterion(criterion)
        clip, amp_dtype, scale = TrainOptions().optim.clip, self.precision.amp_dtype, self.precision.loss_scale
        if ranks is None:
            return SingleEngine(network, criterion, amp_dtype=amp_dtype, clip=clip, ledger=ledger, loss_scale=scale)
        config = self._options.bench
        engine = ranks.engine(
            network,
            criterion,
            batch=config.batch,
            imgsz=config.imgsz,
            amp_dtype=amp_dtype,
            clip=clip,
            ledger=ledger,
            loss_scale=scale,
        )
        return engine.inner if isinstance(engine, MicroBatches) else engine


def layout_of(options: BenchOptions, devices: int) -> Layout:
    """Share the batch out over copies of the network; raises UserError where that is not possible."""
    config = options.bench
    layout = Layout.of(ParallelConfig(), devices=devices, batch=config.batch, nodes=1)
    if config.batch // devices == 1 and config.imgsz == STRIDE:
        raise UserError(
            f"One picture of {STRIDE} px at a time leaves batch norms a single value, which has no variance; take "
            f"imgsz={2 * STRIDE} or more."
        )
    return layout


class _Counts:
    """What the choice of a step asks of an index, where there is no data set: how many images, and their boxes."""

    offsets = np.arange(LONG_RUN[1] + 1, dtype=np.int64) * (BOXES // 2)  # a mosaic shows those of two

    def __len__(self) -> int:
        return len(self.offsets) - 1
