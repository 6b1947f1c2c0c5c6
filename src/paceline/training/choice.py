"""Choice of the step: the candidates are timed on the real network, and what was found is remembered.

```
off     the documented default: bfloat16 where the hardware has it (float16 on a GPU that has not), channels-last
quick   precision x memory layout, then threads, in a few seconds and with as many images as fit into these
full    the same with the whole batch, then compilation if the run is long enough to pay it back
```
On a GPU both take the whole batch, since a step is short there, and libraries choose their kernels for the shapes that
they meet, for seconds, which the run is spared then. So `quick` looks at no other precision and layout than the
default, and both time CUDA graphs beside the best. Where steps cannot be graphs, the host starts every kernel, and what
torch starts by itself may be the faster way: there the best is also timed without kernels of ours, in long runs.

What one run has measured, the next on the same machine with the same task takes from the memory; of compilation it only
counts anew whether it pays.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch

from paceline.parallel.fingerprint import digest_of_package
from paceline.training.candidates import StepTask, candidates, with_threads
from paceline.training.plan import StepPlan
from paceline.training.plan_memory import Measured, Measurement
from paceline.training.rounds import Runs, best_of, time_in_rounds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from paceline.training.machine import Machine
    from paceline.training.plan_memory import PlanMemory

log = logging.getLogger("paceline")

TuneStep = Literal["off", "quick", "full"]
QUICK_S = 4.0
"""Seconds that `quick` spends, more or less, on runs of less than five hours."""
QUICK_SHARE, QUICK_MOST_S = 0.0002, 30.0
"""Longer runs spend this share of themselves, and no more than so many seconds."""
SHORT_SHARE = 0.05
"""A measurement that would take more of the run than this is not made."""
FULL_S = 300.0
"""Seconds that `full` spends at most before it compiles."""
STEPS_PER_CANDIDATE = 4
"""About as many does a candidate take in the rounds, its warm-up among them."""
LEAST_COMPILE_S, MOST_SAVED = 15.0, 0.5
"""Compilation never takes less, nor saves more of a step: where this would not pay, it is not tried."""


LEAST_STEPS_FOR_KERNELS = 10_000
"""A run of fewer does without the seconds in which libraries choose what takes the place of our kernels."""
_QUICK_STEP_S = 0.05
"""So long a step of a GPU may take; to count those of a run under a time budget before one was taken."""


class Trials(Runs[StepPlan], Protocol):
    """Carries plans out on copies of the network."""

    compile_s: float
    """Seconds that went into compilation so far."""


@dataclass(frozen=True, kw_only=True)
class StepChoice:
    """The plan of a run, and how it came about."""

    plan: StepPlan
    source: Literal["default", "measured", "remembered"]
    text: str
    """For the log."""
    entries: tuple[Measured, ...] = ()
    """What was measured, now or earlier."""

    def to_json(self) -> str:
        """Write plan, source and text, for other ranks."""
        return json.dumps({"plan": asdict(self.plan), "source": self.source, "text": self.text})

    @classmethod
    def from_json(cls, text: str) -> StepChoice:
        """Read them back."""
        values = json.loads(text)
        return cls(plan=StepPlan.from_json(values["plan"]), source=values["source"], text=values["text"])


def choose_step(
    task: StepTask,
    tune: TuneStep,
    machine: Machine,
    trials: Callable[[int], AbstractContextManager[Trials]],
    memory: PlanMemory,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> StepChoice:
    """Choose how the steps of a run are taken. Raises UserError where the device cannot do what `amp` asks for.

    trials: carries plans out with a number of images, on copies of the network.
    """
    chooser = _Chooser(task, tune, machine, trials, memory, clock)
    return chooser.choose()


@dataclass(frozen=True)
class _Chooser:
    task: StepTask
    tune: TuneStep
    machine: Machine
    trials: Callable[[int], AbstractContextManager[Trials]]
    memory: PlanMemory
    clock: Callable[[], float]

    def choose(self) -> StepChoice:
        options = candidates(self.task, self.machine)
        default = options[0]
        if self._on_gpu and self.tune == "quick":
            options = (default,)
        if self.tune == "off":
            return _default(default, "tune_step=off takes the default")
        if self.task.deterministic:
            plan = replace(default, graphs=self._has_graphs)  # a graph gives the bits of the eager step
            return _default(plan, "deterministic leaves no choice")
        is_settled = len(options) == 1 and len(with_threads(default, self.task, self.machine)) == 1
        is_settled = is_settled and not self._has_graphs and not self._may_leave_kernels_out
        if is_settled and self.tune == "quick":
            return _default(default, "nothing is left to choose")
        found, mode = self._recall()
        source: Literal["measured", "remembered"] = "measured" if found is None else "remembered"
        if found is None:
            measured = self._measure(options)
            if isinstance(measured, StepChoice):
                return measured
            found, mode = measured, self.tune
            if {entry.plan for entry in found.entries} >= set(options):  # else the time ran out, on a busy machine
                self.memory.keep(self._key(mode), found)
        why_not = self._why_not_compile(found)
        if self.tune == "full" and not why_not:
            found = self._measure_compiled(found)
            self.memory.keep(self._key(mode), found)
        plan, about_compiling = settle(found.entries, self.task)
        if self.tune == "full" and not about_compiling:
            about_compiling = [why_not]
        file = self.memory.file(self._key(mode))
        how = "measured now" if source == "measured" else f"measured {found.date}; delete {file} to measure again"
        text = f"{plan}, of {listing(found.entries)} for {self._images(found.images)} ({how})"
        return StepChoice(
            plan=plan,
            source=source,
            text=". ".join([text, *about_compiling]),
            entries=found.entries,
        )

    @property
    def _on_gpu(self) -> bool:
        return self.task.device.type == "cuda"

    @property
    def _has_graphs(self) -> bool:
        """Whether a step may be captured; where ranks share a network, or exchange by gloo, the host takes part."""
        return self._on_gpu and self.task.is_copied and self.task.is_recordable

    @property
    def _may_leave_kernels_out(self) -> bool:
        """Whether it is worth a try to leave all to torch, should steps be no graphs."""
        long = self.task.steps_within(_QUICK_STEP_S) >= LEAST_STEPS_FOR_KERNELS
        return self._on_gpu and self.task.has_kernels and long

    def _recall(self) -> tuple[Measurement | None, TuneStep]:
        """Look for what a thorough measurement has found first, whoever asks."""
        for mode in ("full", "quick") if self.tune == "quick" else ("full",):
            found = self.memory.recall(self._key(mode))
            if found is not None:
                return found, mode
        return None, self.tune

    def _key(self, mode: TuneStep) -> dict[str, Any]:
        """Everything that the speed of a step hangs on, and what was open."""
        task, machine = self.task, self.machine
        default = candidates(task, machine)
        return {
            "tune_step": mode,
            "device": task.device.type,
            "machine": machine.name,
            "cores": [machine.physical_cores, machine.logical_cores],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "paceline": digest_of_package(),
            "model": task.model,
            "classes": task.num_classes,
            "imgsz": task.imgsz,
            "batch": task.batch,
            "boxes": task.boxes,
            "freeze": task.freeze,
            "kernels": task.has_kernels,
            "ranks": task.ranks,
            "candidates": [str(plan) for plan in default]
            + [str(plan) for plan in with_threads(default[0], task, machine)],
            "compilable": not task.uncompilable,
            "recordable": task.is_recordable,
        }

    def _measure(self, options: Sequence[StepPlan]) -> Measurement | StepChoice:
        """Time everything but compilation; the default where the run is too short for that."""
        task, start = self.task, self.clock()
        probe = task.batch if self._on_gpu else min(task.batch, 2)
        with self.trials(probe) as runs:
            runs.seconds(options[0])
            probe_s = runs.seconds(options[0])
        if self._on_gpu:
            start = self.clock()  # what its libraries need at first, they need once, and the run does without
        if not math.isfinite(probe_s):
            return _default(options[0], "its trial failed")
        step_s = probe_s * task.batch / probe
        run_s = step_s * task.steps_within(step_s)
        budget_s, images = self._budget(probe_s, probe, run_s, len(options))
        if SHORT_SHARE * run_s < (len(options) + 1) * probe_s:
            return _default(options[0], f"a run of about {_duration(run_s)} is too short to measure")
        entries: list[Measured] = []
        with self.trials(images) as runs:
            timed = time_in_rounds(options, runs, budget_s=budget_s - (self.clock() - start), clock=self.clock)
            entries += [Measured(plan=entry.candidate, ms=entry.seconds * 1000) for entry in timed]
            if not math.isfinite(entries[0].ms):
                return _default(options[0], "every trial failed")
            further = [with_threads(entries[0].plan, task, self.machine)]
            if self._has_graphs:
                further.append((entries[0].plan, replace(entries[0].plan, graphs=True)))
            for stage in further:
                if len(stage) > 1:
                    entries = self._compare(entries, stage, runs, self._budget_of_stage(budget_s, entries))
            is_graph = any(entry.plan.graphs and math.isfinite(entry.ms) for entry in entries)
            if self._may_leave_kernels_out and not is_graph:
                stage = (entries[0].plan, replace(entries[0].plan, kernels=False))
                entries = self._compare(entries, stage, runs, self._budget_of_stage(budget_s, entries))
        return Measurement(entries=tuple(entries), images=images)

    def _budget(self, probe_s: float, probe: int, run_s: float, num_options: int) -> tuple[float, int]:
        """Seconds that the measurement may take, and with how many images, from a step with `probe` of them."""
        if self.tune == "full":
            return min(FULL_S, run_s), self.task.batch
        if self._on_gpu:
            return min(QUICK_S, SHORT_SHARE * run_s), self.task.batch
        budget_s = min(max(QUICK_S, QUICK_SHARE * run_s), QUICK_MOST_S)
        fitting = budget_s / (STEPS_PER_CANDIDATE * (num_options + 1) * probe_s / probe)
        images = 2 ** int(math.log2(fitting)) if fitting >= 2 * probe else probe
        return min(budget_s, SHORT_SHARE * run_s), min(images, self.task.batch)

    @staticmethod
    def _budget_of_stage(budget_s: float, entries: Sequence[Measured]) -> float:
        return max(budget_s / 2, 4 * entries[0].ms / 1000)

    def _compare(
        self, entries: list[Measured], stage: Sequence[StepPlan], runs: Trials, budget_s: float
    ) -> list[Measured]:
        """Time variants of the best plan beside it; the best of them comes first.

        What the best one was known to take counts as well: other programs may be busy now, which makes a step slower,
        that of many threads most of all.
        """
        known = {entry.plan: entry.ms / 1000 for entry in entries}
        timed = {e.candidate: e for e in time_in_rounds(stage, runs, budget_s=budget_s, clock=self.clock)}
        most = max(entry.rounds for entry in timed.values())
        for plan in timed.keys() & known.keys():
            timed[plan] = replace(timed[plan], seconds=min(timed[plan].seconds, known[plan]), rounds=most)
        best = best_of([timed[plan] for plan in stage if plan in timed]).candidate
        found = [Measured(plan=entry.candidate, ms=entry.seconds * 1000) for entry in timed.values()]
        rest = [*found, *(entry for entry in entries if entry.plan not in timed)]
        return sorted(rest, key=lambda entry: (entry.plan != best, entry.ms))

    def _why_not_compile(self, found: Measurement) -> str:
        """Say why compilation is not worth a try; empty where it is."""
        step_s, task = found.entries[0].ms / 1000, self.task
        if task.uncompilable:
            return f"Compilation is left out: {task.uncompilable}"
        if any(entry.plan.compile for entry in found.entries):
            return "Compilation was tried before"
        steps = task.steps_within(step_s)
        if step_s * MOST_SAVED * steps < LEAST_COMPILE_S:
            return f"Compilation was not tried: a run of {steps:,} steps is too short to pay it back"
        return ""

    def _measure_compiled(self, found: Measurement) -> Measurement:
        """Compile the best plan and time it beside itself."""
        best = found.entries[0].plan
        compiled = replace(best, compile=True)
        log.info("Compiling the step to see what it saves; this can take minutes, and is remembered.")
        with self.trials(found.images) as runs:
            runs.seconds(compiled)
            compile_s = runs.compile_s
            timed = {
                entry.candidate: entry.seconds * 1000
                for entry in time_in_rounds((best, compiled), runs, budget_s=FULL_S, clock=self.clock)
            }
        first = replace(found.entries[0], ms=timed[best])
        last = Measured(plan=compiled, ms=timed[compiled], compile_s=compile_s)
        return replace(found, entries=(first, *found.entries[1:], last))

    def _images(self, images: int) -> str:
        return f"{images} images" if images == self.task.batch else f"{images} of the {self.task.batch} images"


def settle(entries: Sequence[Measured], task: StepTask) -> tuple[StepPlan, list[str]]:
    """Return the plan for a run, the compiled one if that pays; and sentences about it."""
    best = entries[0]
    compiled = next((entry for entry in entries if entry.plan.compile), None)
    if compiled is None or best.plan.compile:
        return best.plan, []
    if not math.isfinite(compiled.ms):
        return best.plan, ["Compilation failed when it was tried"]
    saved_ms = best.ms - compiled.ms
    steps = task.steps_within(best.ms / 1000)
    costs = f"Compiling costs {compiled.compile_s:.0f} s"
    if saved_ms <= 0:
        return best.plan, [f"{costs} and saves nothing"]
    needed = math.ceil(compiled.compile_s * 1000 / saved_ms)
    costs = f"{costs} and saves {_figure(saved_ms)} ms a step"
    if needed >= steps:
        return best.plan, [f"{costs}: it would pay back after {needed:,} steps, and this run has {steps:,}"]
    return compiled.plan, [f"{costs}: pays back after {needed:,} of {steps:,} steps"]


def listing(entries: Sequence[Measured]) -> str:
    """Name every candidate with its milliseconds."""
    return ", ".join(
        f"{entry.plan} {_figure(entry.ms)} ms" if math.isfinite(entry.ms) else f"{entry.plan} not possible"
        for entry in entries
    )


def _default(plan: StepPlan, why: str) -> StepChoice:
    return StepChoice(plan=plan, source="default", text=f"{plan} ({why})")


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 1 else f"{ms:.2f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
