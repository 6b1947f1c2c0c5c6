"""Trials: full steps of a plan on a copy of the network, timed; the network of the run is left as it is."""

from __future__ import annotations

import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Self

import torch

from paceline.batch import Batch
from paceline.training.compiling import Compiler
from paceline.training.graphed import CudaCapture, GraphedStep, graphed
from paceline.training.plan import kernels_of
from paceline.training.schedule import Rates
from paceline.training.understudy import understudy

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from paceline.training.compile_cache import CompileCache
    from paceline.training.graphed import Capture
    from paceline.training.plan import StepPlan
    from paceline.training.step import Step
    from paceline.training.understudy import Cast

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """What a step is made of, and what it is given."""

    cast: Cast
    device: torch.device
    imgsz: int
    boxes: int
    """Ground truths in each image."""
    padded_boxes: int
    """Room for ground truths in each image."""
    compile_cache: Callable[[StepPlan], CompileCache] | None = None
    """Where compiled code of a plan is kept."""


class StepTrials:
    """Carries plans out, each on its own copy of network, optimiser and average, with one batch of noise."""

    def __init__(
        self, setting: TrialSetting, images: int, *, capture: Callable[[torch.device], Capture] = CudaCapture
    ) -> None:
        """Make the batch; `capture` makes what records graphs."""
        self._setting = setting
        self._capture = partial(capture, setting.device)
        self._batch = noise(images, setting)
        self._steps: dict[StepPlan, Step] = {}
        self._threads = torch.get_num_threads()
        self._stack = ExitStack()
        self._compiler: Compiler | None = None
        self.compile_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Free everything, and put back the number of threads."""
        self._steps.clear()
        self._stack.close()
        self._empty()
        torch.set_num_threads(self._threads)

    def seconds(self, plan: StepPlan) -> float:
        """Take one step, an update included; infinite where this machine cannot. A GPU's first one is not counted."""
        with kernels_of(plan):
            return self._seconds(plan)

    def _seconds(self, plan: StepPlan) -> float:
        if self._setting.device.type == "cpu":
            torch.set_num_threads(plan.threads or self._threads)
        try:
            start = time.perf_counter()
            is_new = self._of_all_threads(plan) not in self._steps
            step = self._step(plan)
            batch = self._batch if plan.channels_last else self._batch.channels_first()
            if is_new and self._setting.device.type == "cuda":  # libraries load code and choose kernels, for seconds
                step(batch, _RATES, completes=True)
            self._settle()
            begun = time.perf_counter()
            step(batch, _RATES, completes=True)
            self._settle()
            end = time.perf_counter()
        except RuntimeError as error:  # out of memory among them
            log.info("Trial of %s failed: %s", plan, str(error).strip().split("\n")[0])
            self.leave(plan)
            return math.inf
        if isinstance(step, GraphedStep) and step.num_graphs == 0:
            return math.inf
        if plan.compile and self._compiler is not None:
            if self._compiler.failure:
                return math.inf
            if is_new:
                self.compile_s += end - start
        return end - begun

    def leave(self, plan: StepPlan) -> None:
        """Free the copies of a plan, unless another one with as many threads uses them."""
        self._steps.pop(self._of_all_threads(plan), None)
        self._empty()

    @staticmethod
    def _of_all_threads(plan: StepPlan) -> StepPlan:
        """Compiled code has its number of threads written into it; the rest takes any."""
        return plan if plan.compile else replace(plan, threads=0)

    def _step(self, plan: StepPlan) -> Step:
        key = self._of_all_threads(plan)
        if key not in self._steps:
            self._steps[key] = self._build(plan)
        return self._steps[key]

    def _build(self, plan: StepPlan) -> Step:
        compiler = self._open_compiler(plan) if plan.compile else None
        step = understudy(self._setting.cast, plan.precision, channels_last=plan.channels_last, compiler=compiler)
        return graphed(step, self._capture()) if plan.graphs else step

    def _open_compiler(self, plan: StepPlan) -> Compiler:
        if self._compiler is None:
            cache = self._setting.compile_cache(plan) if self._setting.compile_cache else None
            self._compiler = self._stack.enter_context(Compiler(cache=cache))
        return self._compiler

    def _settle(self) -> None:
        if self._setting.device.type == "cuda":
            torch.cuda.synchronize(self._setting.device)

    def _empty(self) -> None:
        if self._setting.device.type == "cuda":
            torch.cuda.empty_cache()


_RATES = Rates(lr=1e-6, bias_lr=1e-6, momentum=0.9)
"""Small ones: what is learned from noise is of no use, and what diverges may be slower."""


def noise(images: int, setting: TrialSetting) -> Batch:
    """Make a batch of random pixels and boxes; torch's own random state stays as it is."""
    random = torch.Generator().manual_seed(0)
    side, count = setting.imgsz, setting.padded_boxes
    pixels = torch.randint(0, 256, (images, 3, side, side), generator=random, dtype=torch.uint8)
    corners = torch.rand(images, count, 2, generator=random) * 0.78 * side
    sides = (torch.rand(images, count, 2, generator=random) * 0.2 + 0.02) * side
    valid = torch.arange(count).expand(images, -1) < setting.boxes
    batch = Batch(
        images=pixels.contiguous(memory_format=torch.channels_last),
        boxes=torch.cat((corners, corners + sides), dim=-1) * valid.unsqueeze(-1),
        labels=torch.randint(0, setting.cast.network.num_classes, (images, count), generator=random) * valid,
        valid=valid,
        samples=torch.arange(images),
        original_hw=torch.full((images, 2), side),
    )
    return batch.to(setting.device)
