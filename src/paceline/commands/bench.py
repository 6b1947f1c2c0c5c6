"""`paceline bench`: how fast a network trains here, where the time goes, and how far that is from the limits."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.addresses import shown
from paceline.commands.bench_evaluation import measure_evaluation
from paceline.commands.bench_subject import BenchSubject, layout_of
from paceline.commands.device import backend_of, count_devices, make_current, resolve_device
from paceline.commands.weights import find_weights, require_model
from paceline.errors import UserError
from paceline.models.statistics import arithmetic_of, count_gflops
from paceline.parallel.config import LimitsConfig
from paceline.parallel.gather import from_first
from paceline.parallel.partition import measure as measure_nodes
from paceline.parallel.process_group import joined
from paceline.parallel.rank import rank_of_environment
from paceline.planning.energy import EnergyCounter, NoCounter, counter_of
from paceline.planning.limits import best_of, measure_limits, rates_of
from paceline.planning.machine import machine_of
from paceline.planning.memory import PeakMemory
from paceline.planning.record import (
    BenchRecord,
    EnergyRecord,
    NodeRecord,
    PartRecord,
    RanksRecord,
    StepRecord,
)
from paceline.planning.roofline import evaluation_passes, seconds_of, step_work
from paceline.training.plan import carrying_out

if TYPE_CHECKING:
    from paceline.commands.bench_data import DataBench
    from paceline.commands.bench_step import StepBench, StepTimes
    from paceline.options import BenchOptions
    from paceline.parallel.process_group import ProcessGroup
    from paceline.planning.record import DataRecord
    from paceline.planning.roofline import Rates, StepWork
    from paceline.training.compiling import Compiler

log = logging.getLogger("paceline")

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
    """Count the processes that have to be started for these options, see `paceline.commands.layout`.

    Raises UserError at once, before anything is started, for what is not possible.
    """
    check(options)
    if rank_of_environment() is not None:
        return 1
    count = count_devices(options.bench.device, options.bench.devices)
    layout_of(options, count)
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


class _Bench:
    """One bench being taken; each method measures one thing."""

    def __init__(self, options: BenchOptions, group: ProcessGroup) -> None:
        check(options)
        self._start = time.perf_counter()
        self._config = options.bench
        self._options = options
        rank = group.rank
        named = resolve_device(options.bench.device, local_rank=rank.local_rank, local_world=rank.local_world)
        device = make_current(named)
        self._energy = _counter(device)
        self._memory = PeakMemory(device)
        self._subject = BenchSubject(options, group, device)
        self._device = device

    def run(self) -> BenchRecord:
        """Measure everything, one after the other, with the threads of the plan."""
        with carrying_out(self._subject.plan):
            return self._run()

    def _run(self) -> BenchRecord:
        config, network, device = self._options.bench, self._subject.loaded.network, self._device
        arithmetic = arithmetic_of(network, config.imgsz)
        gflops = count_gflops(network, config.imgsz)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        several = self._subject.layout.devices > 1
        itemsize = 4 if self._subject.precision.name == "fp32" else 2
        work = step_work(arithmetic, images=self._subject.share, itemsize=itemsize, parameters=trained)
        self._memory.forget()
        with ExitStack() as stack:
            data = self._subject.data()
            batch = stack.enter_context(data).first_batch() if data is not None else self._subject.noise()
            compiler = self._subject.compiler()
            if compiler is not None:
                stack.enter_context(compiler)
            step = self._subject.step(batch, compiler)
            memory = self._memory.record()  # of the steps that warmed up, before a second network is there
            limits = measure_limits(device, self._types())
            beside = self._subject.step_alone(batch, compiler) if several else None
            log.info("Timing the step, for about %.0f s.", config.seconds)
            times = step.measure(config.seconds, alone=beside)
            energy = self._measure_energy(step, times)
            measured_data = self._measure_data(data, step)
        limits = best_of(limits, measure_limits(device, self._types()))  # early and late: neighbours come and go
        rates = rates_of(limits, self._subject.precision.name)
        evaluation = None
        nodes: tuple[NodeRecord, ...] = ()
        if not several:
            nodes = self._measure_nodes(work, rates)
            limit_s = seconds_of(evaluation_passes(arithmetic, images=self._subject.share, itemsize=itemsize), rates)
            evaluation = measure_evaluation(
                self._subject.network().network,  # as it was before the steps
                batch,
                device=device,
                amp_dtype=self._subject.precision.amp_dtype,
                is_trained=self._subject.loaded.source is not None,
                limit_s=limit_s,
                budget_s=config.seconds,
            )
        return BenchRecord(
            options={
                name: shown(value) if isinstance(value, str) else value
                for name, value in self._options.to_flat().items()
            },
            machine=machine_of(device),
            model=self._subject.loaded.model,
            parameters=trained,
            gflops=gflops,
            plan=str(self._subject.plan),
            precision=self._subject.precision.name,
            limits=limits,
            step=self._step_record(times, work, rates),
            nodes=nodes,
            memory=memory,
            evaluation=evaluation,
            energy=energy,
            data=measured_data,
            ranks=self._ranks_record(times),
            wall_s=time.perf_counter() - self._start,
            notes=self._notes(step, compiler),
        )

    def _types(self) -> tuple[str, ...]:
        """List the types whose matrix rate is measured: float32, and the other that networks compute in here."""
        half = self._subject.precision.name if self._subject.precision.name != "fp32" else "bf16"
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
        images = number * (self._subject.share if self._device.type == "cuda" else self._options.bench.batch)
        return EnergyRecord(joules_per_image=(self._energy.joules() - before) / images, source=self._energy.source)

    def _measure_data(self, data: DataBench | None, step: StepBench) -> DataRecord | None:
        if data is None:
            return None
        log.info("Timing the loader alone and the whole, for about %.0f s each.", self._options.bench.seconds)
        return data.measure(step.take, self._options.bench.seconds)

    def _measure_nodes(self, work: StepWork, rates: Rates) -> tuple[NodeRecord, ...]:
        """Time each node by itself, forward and backward."""
        network, imgsz = self._subject.network().network, self._options.bench.imgsz
        images, amp_dtype = self._subject.share, self._subject.precision.amp_dtype
        log.info("Timing each of the %d nodes by itself.", len(network.nodes))
        costs = measure_nodes(network, images=images, size_hw=(imgsz, imgsz), amp_dtype=amp_dtype)
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
            devices=self._subject.layout.devices, alone_ms=times.alone_s.times(1e3), waiting_share=times.waiting_share
        )

    def _notes(self, step: StepBench, compiler: Compiler | None) -> tuple[str, ...]:
        notes = []
        if compiler is not None and compiler.failure:
            notes.append(f"Nothing was compiled in the end: {compiler.failure}")
        if step.is_recorded:
            notes.append("The whole step is a graph; its parts are those of the same step without one.")
        if self._device.type != "cpu":
            notes.append("Nodes are started one by one by the host, which takes longer than small ones do.")
        if self._subject.layout.devices > 1:
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
