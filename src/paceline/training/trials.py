"""Trials: full steps of a plan on a copy of the network, timed; the network of the run is left as it is."""

from __future__ import annotations

import copy
import logging
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch

from paceline.batch import Batch
from paceline.ledger import Ledger
from paceline.parallel.single import SingleEngine
from paceline.training.compiling import Compiler
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.optim import OptimPlan, build_optimizer
from paceline.training.schedule import Rates
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from types import TracebackType

    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion
    from paceline.training.compile_cache import CompileCache
    from paceline.training.plan import StepPlan
    from paceline.training.step import Step

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class TrialSetting:
    """What a step is made of besides its plan."""

    network: DetectionModel
    criterion: Criterion
    optimizer: OptimPlan
    device: torch.device
    imgsz: int
    boxes: int
    """Ground truths in each image, no padding among them."""
    clip: float
    freeze: int = 0
    compile_cache: CompileCache | None = None


class StepTrials:
    """Carries plans out, each on its own copy of network, optimiser and average, with one batch of noise."""

    def __init__(self, setting: TrialSetting, images: int) -> None:
        self._setting = setting
        self._batch = noise(images, setting)
        self._steps: dict[StepPlan, tuple[Step, list[DetectionModel], int]] = {}
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
        """Take one step, an update included; infinite where this machine cannot."""
        if self._setting.device.type == "cpu":
            torch.set_num_threads(plan.threads or self._threads)
        try:
            start = time.perf_counter()
            is_new = self._of_all_threads(plan) not in self._steps
            step = self._step(plan)
            self._settle()
            begun = time.perf_counter()
            step(self._batch, _RATES, completes=True)
            self._settle()
            end = time.perf_counter()
        except RuntimeError as error:  # out of memory among them
            log.info("Trial of %s failed: %s", plan, str(error).strip().split("\n")[0])
            self.leave(plan)
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
