"""How a run takes its steps: the choice put together from options, data and network, and carried out."""

from __future__ import annotations

import logging
import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.cache_folder import cache_folder
from paceline.data.targets import bucket
from paceline.parallel.build import exchanges_by_device
from paceline.training.ahead import compile_ahead
from paceline.training.candidates import StepTask
from paceline.training.choice import choose_step
from paceline.training.compile_cache import CompileCache, compiler_key
from paceline.training.compiling import Compiler
from paceline.training.machine import Machine
from paceline.training.plan_memory import PlanMemory
from paceline.training.recipe import Recipe
from paceline.training.trials import StepTrials, TrialSetting
from paceline.training.understudy import Cast
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    import torch

    from paceline.commands.weights import LoadedNetwork
    from paceline.data.index import Index
    from paceline.options import TrainOptions
    from paceline.parallel.engine import Criterion
    from paceline.parallel.layout import Layout
    from paceline.parallel.process_group import ProcessGroup
    from paceline.training.choice import StepChoice
    from paceline.training.plan import StepPlan

log = logging.getLogger("paceline")

DENSE = 0.95
"""This share of the images has no more boxes than those that a step is timed with."""
MOSAIC_FILL = 2.0
"""A mosaic shows about so many images' boxes."""


@dataclass(frozen=True)
class RunStep:
    """What the choice of a run hangs on, and what is made of it."""

    options: TrainOptions
    loaded: LoadedNetwork
    train_index: Index
    _: KW_ONLY
    criterion: Criterion
    layout: Layout
    batch: int
    """Images per step over all ranks."""
    device: torch.device
    local_world: int
    """Ranks on this machine."""
    epochs_done: int = 0
    limit_s: float | None = None

    def choose(self) -> StepChoice:
        """Measure, or remember; for one rank to do. Raises UserError where the device cannot do what `amp` says."""
        machine = Machine.of(self.device)
        memory = PlanMemory(folder=cache_folder() / "steps")
        choice = choose_step(self.task, self.options.loop.tune_step, machine, self._trials, memory)
        log.info("Step: %s.", choice.text)
        return choice

    @property
    def task(self) -> StepTask:
        """The task, in the terms of the choice."""
        options, layout = self.options, self.layout
        epochs = max(options.loop.epochs - self.epochs_done, 0)
        return StepTask(
            device=self.device,
            model=self.loaded.model,
            num_classes=self.loaded.network.num_classes,
            imgsz=options.data.imgsz,
            batch=self._share,
            boxes=bucket(self._boxes),
            steps=math.ceil(epochs * len(self.train_index) / self.batch),
            limit_s=self.limit_s,
            amp=options.loop.amp,
            deterministic=options.loop.deterministic,
            freeze=options.loop.freeze,
            ranks=self.local_world,
            is_copied=layout.shard == 1 and layout.pipeline == 1,
            is_recordable=exchanges_by_device(),
            has_kernels=usable(self.device),
            uncompilable=self._uncompilable,
        )

    def compile_ahead(self, plan: StepPlan, group: ProcessGroup) -> None:
        """Compile the kernels of a plan before its first step; where there were trials, these have done it."""
        if plan.kernels and plan.channels_last and not plan.compile:
            with group.first_on_node("kernels"):
                compile_ahead(self.loaded.network, self.criterion, plan.precision.amp_dtype)

    def compiler(self, plan: StepPlan, *, keeps: bool) -> Compiler:
        """Make what compiles for a plan, to be opened; `keeps` what it has compiled for later runs, or only uses it."""
        return Compiler(cache=self._cache(plan, self._share, keeps=keeps))

    @property
    def _share(self) -> int:
        """Images of a replica in a step."""
        return self.batch // self.layout.replicas

    @property
    def _boxes(self) -> int:
        """Ground truths of a picture that is dense, but not the densest."""
        counts = np.diff(self.train_index.offsets)
        dense = float(np.quantile(counts, DENSE)) if len(counts) else 0.0
        return max(round(dense * (MOSAIC_FILL if self.options.augment.mosaic > 0 else 1.0)), 1)

    @property
    def _uncompilable(self) -> str:
        options, layout = self.options, self.layout
        if layout.shard > 1 or layout.pipeline > 1:
            return "shards and stages are taken as they are"
        if layout.norm_ranks > 1:
            return "batch norms talk to other ranks"
        if options.augment.multi_scale > 0:
            return "multi_scale changes the image size"
        return ""

    def _trials(self, images: int) -> StepTrials:
        options = self.options
        recipe = Recipe.of(
            options.optim,
            num_images=len(self.train_index),
            num_classes=self.loaded.network.num_classes,
            batch=self.batch,
            epochs=options.loop.epochs,
        )
        cast = Cast(
            network=self.loaded.network,
            criterion=self.criterion,
            optimizer=recipe.plan,
            freeze=options.loop.freeze,
            clip=options.optim.clip,
        )
        setting = TrialSetting(
            cast=cast,
            device=self.device,
            imgsz=options.data.imgsz,
            boxes=self._boxes,
            padded_boxes=bucket(self._boxes),
            compile_cache=lambda plan: self._cache(plan, images, keeps=True),
        )
        return StepTrials(setting, images)

    def _cache(self, plan: StepPlan, images: int, *, keeps: bool) -> CompileCache:
        key = compiler_key() | {
            "model": self.loaded.model,
            "classes": str(self.loaded.network.num_classes),
            "imgsz": str(self.options.data.imgsz),
            "images": str(images),
            "plan": str(plan),
            "freeze": str(self.options.loop.freeze),
        }
        return CompileCache(cache_folder() / "compiled", key, keeps=keeps)
