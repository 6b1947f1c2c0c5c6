"""`paceline bench`: how fast a network trains here, where the time goes, and how far that is from the limits."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.commands.bench_data import DataBench
from paceline.commands.bench_evaluation import measure_evaluation
from paceline.commands.bench_step import StepBench, StepTimes, alone_beside
from paceline.commands.device import backend_of, count_devices, place, resolve_device
from paceline.commands.run_data import RunData, splits
from paceline.commands.weights import find_weights, load_network, require_model
from paceline.data.dataset import open_data_set
from paceline.errors import UserError
from paceline.losses.detection import DetectionLoss
from paceline.models.statistics import arithmetic_of, count_gflops
from paceline.option_values import STRIDE
from paceline.options import TrainOptions
from paceline.parallel.build import Ranks, num_ranks
from paceline.parallel.config import LimitsConfig, ParallelConfig
from paceline.parallel.gather import from_first
from paceline.parallel.layout import Layout
from paceline.parallel.micro import MicroBatches
from paceline.parallel.partition import measure as measure_nodes
from paceline.parallel.process_group import joined
from paceline.parallel.rank import rank_of_environment
from paceline.planning.energy import EnergyCounter, NoCounter, counter_of
from paceline.planning.limits import best_of, measure_limits, rates_of
from paceline.planning.machine import machine_of
from paceline.planning.memory import PeakMemory
from paceline.planning.noise import noise_batch
from paceline.planning.record import (
    BenchRecord,
    EnergyRecord,
    NodeRecord,
    PartRecord,
    RanksRecord,
    StepRecord,
)
from paceline.planning.roofline import evaluation_passes, seconds_of, step_work
from paceline.training.machine import Machine
from paceline.training.precision import precisions

if TYPE_CHECKING:
    from paceline.batch import Batch
    from paceline.commands.weights import LoadedNetwork
    from paceline.data.dataset import DataSet
    from paceline.ledger import Ledger
    from paceline.options import BenchOptions
    from paceline.parallel.engine import Engine
    from paceline.parallel.process_group import ProcessGroup
    from paceline.planning.record import DataRecord
    from paceline.planning.roofline import Rates, StepWork

log = logging.getLogger("paceline")

CLASSES = 80
"""Of the network where neither weights nor a data set say how many."""
ENERGY_SHARE = 0.3
"""Of the time for the step, in which energy is counted."""


def bench(options: BenchOptions) -> BenchRecord:
    """Measure as the options say; in a process that was started as one of several, this is its part of it.

    Raises UserError for whatever the user can mend, a batch that does not fit into the GPU's memory among it.
    """
    config = options.bench
    with joined(backend=backend_of(config.device), limits=LimitsConfig(), devices=config.devices) as group:
        group.report(0, "evaluation")  # a phase that may take long
        try:
            return _Bench(options, group).run()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"batch={config.batch} at {config.imgsz} px does not fit into the memory of the GPU; take a smaller "
                "batch, or smaller images."
            ) from error


def ranks_to_launch(options: BenchOptions) -> int:
    """Count the processes that have to be started for these options, see `paceline.commands.train`.

    Raises UserError at once, before anything is started, for what is not possible.
    """
    check(options)
    if rank_of_environment() is not None:
        return 1
    count = count_devices(options.bench.device, options.bench.devices)
    _layout(options, count)
    return count


def check(options: BenchOptions) -> None:
    """Raise UserError for what can be told to be wrong before anything is measured."""
    require_model(options.model)
    config = options.bench
    for name, path in (("json", config.json), ("compare", config.compare)):
        if path and Path(path).is_dir():
            raise UserError(f"{name}={path} is a folder; name a file.")
    if config.num_classes and (config.data or find_weights(options.model) is not None):
        raise UserError(f"num_classes={config.num_classes} is known of a data set and of weights; leave it out.")
    if config.cache != "auto" and not config.data:
        raise UserError(f"cache={config.cache} is for the images of a data set; name one by data=, or leave it out.")
    if config.workers >= 0 and not config.data:
        raise UserError(f"workers={config.workers} load the images of a data set; name one by data=, or leave it out.")


def _layout(options: BenchOptions, devices: int) -> Layout:
    config = options.bench
    layout = Layout.of(ParallelConfig(), devices=devices, batch=config.batch, nodes=1)
    if config.batch // devices == 1 and config.imgsz == STRIDE:
        raise UserError(
            f"One picture of {STRIDE} px at a time leaves batch norms a single value, which has no variance; take "
            f"imgsz={2 * STRIDE} or more."
        )
    return layout


class _Bench:
    """One bench being taken; each method measures one thing."""

    def __init__(self, options: BenchOptions, group: ProcessGroup) -> None:
        check(options)
        self._start = time.perf_counter()
        self._options = options
        config = options.bench
        rank = group.rank
        self._local_world = rank.local_world
        self._device = resolve_device(config.device, local_rank=rank.local_rank, local_world=rank.local_world)
        torch.manual_seed(0)
        self._data_set: DataSet | None = None
        if config.data:
            with group.first_on_node("index"):
                self._data_set = open_data_set(self._train_options.data, seed=0)
        self._energy = _counter(self._device)
        self._memory = PeakMemory(self._device)
        self._loaded = self._network()
        self._layout = _layout(options, num_ranks())
        self._ranks = Ranks(self._layout, self._device)
        self._share = config.batch // self._layout.replicas
        self._precision = from_first(precisions(config.amp, Machine.of(self._device), self._device)[0])

    def run(self) -> BenchRecord:
        """Measure everything, one after the other."""
        config, network, device = self._options.bench, self._loaded.network, self._device
        arithmetic = arithmetic_of(network, config.imgsz)
        gflops = count_gflops(network, config.imgsz)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        several = self._layout.devices > 1
        itemsize = 4 if self._precision.name == "fp32" else 2
        work = step_work(arithmetic, images=self._share, itemsize=itemsize, parameters=trained)
        self._memory.forget()
        with ExitStack() as stack:
            data = stack.enter_context(self._data()) if self._data_set is not None else None
            batch = data.first_batch() if data else self._noise()
            step = StepBench(self._engine_of, batch, device)
            memory = self._memory.record()  # of the steps that warmed up, before a second network is there
            limits = measure_limits(device, self._types())
            beside = None
            if several:
                beside = alone_beside(self._network().network, self._criterion(), batch, device, self._precision)
            log.info("Timing the step, for about %.0f s.", config.seconds)
            times = step.measure(config.seconds, alone=beside)
            energy = self._measure_energy(step, times)
            measured_data = self._measure_data(data, step)
        limits = best_of(limits, measure_limits(device, self._types()))  # early and late: neighbours come and go
        rates = rates_of(limits, self._precision.name)
        evaluation = None
        nodes: tuple[NodeRecord, ...] = ()
        if not several:
            nodes = self._measure_nodes(work, rates)
            limit_s = seconds_of(evaluation_passes(arithmetic, images=self._share, itemsize=itemsize), rates)
            evaluation = measure_evaluation(
                self._network().network,  # as it was before the steps
                batch,
                device=device,
                amp_dtype=self._precision.amp_dtype,
                is_trained=self._loaded.source is not None,
                limit_s=limit_s,
                budget_s=config.seconds,
            )
        return BenchRecord(
            options=self._options.to_flat(),
            machine=machine_of(device),
            model=self._loaded.model,
            parameters=trained,
            gflops=gflops,
            plan=f"{self._precision.name}, channels-last",
            precision=self._precision.name,
            limits=limits,
            step=self._step_record(times, work, rates),
            nodes=nodes,
            memory=memory,
            evaluation=evaluation,
            energy=energy,
            data=measured_data,
            ranks=self._ranks_record(times),
            wall_s=time.perf_counter() - self._start,
            notes=self._notes(),
        )

    @property
    def _train_options(self) -> TrainOptions:
        """The options of a training that the data are opened for."""
        config = self._options.bench
        named = {name: getattr(config, name) for name in ("data", "imgsz", "batch", "workers", "cache", "amp")}
        return TrainOptions.from_flat({"model": self._options.model, **named})

    def _network(self) -> LoadedNetwork:
        """Load the network onto the device, for the classes of the data set, of the weights, or 80 of them."""
        names: tuple[str, ...] | None = None
        if self._data_set is not None:
            names = self._data_set.names
        elif find_weights(self._options.model) is None:
            names = tuple(str(number) for number in range(self._options.bench.num_classes or CLASSES))
        loaded = load_network(self._options.model, names)
        place(loaded.network, self._device)
        return loaded

    def _data(self) -> DataBench:
        assert self._data_set is not None
        train_index, val_index = splits(self._data_set)
        batch = self._options.bench.batch
        if batch > len(train_index):
            raise UserError(
                f"batch={batch} is more than the {len(train_index)} training images of {self._data_set.source}; take "
                "a smaller batch, or a larger set."
            )
        run_data = RunData(
            self._train_options,
            train_index,
            val_index,
            batch=batch,
            ranks=self._ranks,
            device=self._device,
            local_world=self._local_world,
        )
        return DataBench(run_data, self._precision, self._device, str(self._data_set.source))

    def _noise(self) -> Batch:
        """Make a batch as it would come: drawn by the device on a GPU, by the host elsewhere."""
        drawn_as = (self._precision.amp_dtype or torch.float32) if self._device.type == "cuda" else None
        classes = self._loaded.network.num_classes
        return noise_batch(self._share, self._options.bench.imgsz, classes, dtype=drawn_as, device=self._device)

    def _criterion(self) -> DetectionLoss:
        network = self._loaded.network
        return DetectionLoss(
            TrainOptions().loss, num_classes=network.num_classes, reg_max=network.reg_max, strides=network.strides
        )

    def _engine_of(self, ledger: Ledger) -> Engine:
        """Build the trainer's engine; one that runs out of memory is to say so, not to go on in micro-batches."""
        config = self._options.bench
        engine = self._ranks.engine(
            self._loaded.network,
            self._criterion(),
            batch=config.batch,
            imgsz=config.imgsz,
            amp_dtype=self._precision.amp_dtype,
            clip=TrainOptions().optim.clip,
            ledger=ledger,
            loss_scale=self._precision.loss_scale,
        )
        return engine.inner if isinstance(engine, MicroBatches) else engine

    def _types(self) -> tuple[str, ...]:
        """List the types whose matrix rate is measured: float32, and the other that networks compute in here."""
        half = self._precision.name if self._precision.name != "fp32" else "bf16"
        return ("fp32", half)

    def _measure_energy(self, step: StepBench, times: StepTimes) -> EnergyRecord:
        """Count the energy of some more steps, the same number on all ranks."""
        number = from_first(max(2, round(ENERGY_SHARE * self._options.bench.seconds / times.whole_s.median)))
        if isinstance(self._energy, str):
            return EnergyRecord(joules_per_image=None, source=self._energy)
        self._settle()
        before = self._energy.joules()
        for _ in range(number):
            step.take()
        self._settle()
        images = number * (self._share if self._device.type == "cuda" else self._options.bench.batch)
        return EnergyRecord(joules_per_image=(self._energy.joules() - before) / images, source=self._energy.source)

    def _measure_data(self, data: DataBench | None, step: StepBench) -> DataRecord | None:
        if data is None:
            return None
        log.info("Timing the loader alone and the whole, for about %.0f s each.", self._options.bench.seconds)
        return data.measure(step.take, self._options.bench.seconds)

    def _measure_nodes(self, work: StepWork, rates: Rates) -> tuple[NodeRecord, ...]:
        """Time each node by itself, forward and backward."""
        network, imgsz = self._loaded.network, self._options.bench.imgsz
        log.info("Timing each of the %d nodes by itself.", len(network.nodes))
        costs = measure_nodes(network, images=self._share, size_hw=(imgsz, imgsz), amp_dtype=self._precision.amp_dtype)
        attainable = rates.attainable()
        return tuple(
            NodeRecord(
                node=number,
                kind=type(node.module).__name__,
                measured_ms=1e3 * cost.seconds,
                limit_ms=1e3 * seconds_of(work.nodes.get(number, ()), rates),
                attainable_ms=1e3 * seconds_of(work.nodes.get(number, ()), attainable),
            )
            for number, (node, cost) in enumerate(zip(network.nodes, costs, strict=True))
        )

    def _step_record(self, times: StepTimes, work: StepWork, rates: Rates) -> StepRecord:
        attainable = rates.attainable()
        parts = {
            name: PartRecord(
                measured_ms=times.parts_s[name].times(1e3) if name in times.parts_s else None,
                limit_ms=1e3 * seconds_of(passes, rates),
                attainable_ms=1e3 * seconds_of(passes, attainable),
            )
            for name, passes in work.parts.items()
        }
        for name in times.parts_s.keys() - parts.keys():
            parts[name] = PartRecord(measured_ms=times.parts_s[name].times(1e3), limit_ms=0.0, attainable_ms=0.0)
        return StepRecord(
            images=self._options.bench.batch,
            images_per_s=times.whole_s.rate(self._options.bench.batch),
            whole_ms=times.whole_s.times(1e3),
            parts=parts,
            limit_ms=1e3 * work.seconds(rates),
            attainable_ms=1e3 * work.seconds(attainable),
            operations=work.operations,
            bytes=work.bytes,
            memory_share=work.memory_share(rates),
        )

    def _ranks_record(self, times: StepTimes) -> RanksRecord | None:
        if times.alone_s is None or times.waiting_share is None:
            return None
        return RanksRecord(
            devices=self._layout.devices, alone_ms=times.alone_s.times(1e3), waiting_share=times.waiting_share
        )

    def _notes(self) -> tuple[str, ...]:
        notes = []
        if self._layout.devices > 1:
            notes.append("Parts, limits and memory are those of the first device, which has its share of the batch.")
        if self._device.type == "cpu":
            notes.append("On a CPU, maps that stay in its caches can be faster than the copy bandwidth allows.")
        if not self._options.bench.data:
            notes.append("The step's batch is noise with 16 boxes per image; data= would take it from a data set.")
        return tuple(notes)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _counter(device: torch.device) -> EnergyCounter | str:
    """Find what counts energy, or why nothing does."""
    try:
        return counter_of(device)
    except NoCounter as reason:
        return f"not measured: {reason}"
