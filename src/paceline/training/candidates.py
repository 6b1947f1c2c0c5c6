"""Candidates: the plans of a step that are worth timing, as far as user, device and layout leave a choice."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from paceline.training.plan import StepPlan
from paceline.training.precision import Amp, precisions

if TYPE_CHECKING:
    from paceline.training.machine import Machine


@dataclass(frozen=True, kw_only=True)
class StepTask:
    """What a step is chosen for."""

    device: torch.device
    model: str
    num_classes: int
    imgsz: int
    batch: int
    """Images of this rank in a step."""
    boxes: int
    """Room for ground truths in each image."""
    steps: int
    """Steps that the run has before it."""
    limit_s: float | None = None
    """Seconds that it may take, where the user has set a limit."""
    amp: Amp = "auto"
    deterministic: bool = False
    freeze: int = 0
    ranks: int = 1
    """Ranks on this machine."""
    is_copied: bool = True
    """Whether every rank has the whole network, in memory as it likes; shards and stages lie as they have to."""
    is_recordable: bool = True
    """Whether gradients, where they travel, do so by the device alone (NCCL); by gloo the host takes part."""
    has_kernels: bool = False
    """Whether our own kernels take part of a step on this device."""
    uncompilable: str = ""
    """Why compilation is out of the question, to go on after `because`; empty where it is not."""

    @property
    def leaves_threads(self) -> bool:
        """Whether the number of threads is ours to choose."""
        return self.device.type == "cpu" and self.ranks == 1 and "OMP_NUM_THREADS" not in os.environ

    def steps_within(self, seconds: float) -> int:
        """Count the steps of the run, were each to take so long."""
        return self.steps if self.limit_s is None else min(self.steps, int(self.limit_s / max(seconds, 1e-9)))


def candidates(task: StepTask, machine: Machine) -> tuple[StepPlan, ...]:
    """List the plans for precision and memory layout, the documented default first, then what differs most from it.

    Under `deterministic` there is the default alone, since plans differ in how they round. Raises UserError where the
    device cannot do what `amp` asks for.
    """
    chosen = precisions(task.amp, machine, task.device)
    if task.deterministic:
        return (StepPlan(precision=chosen[0]),)
    layouts = (True, False) if task.is_copied else (True,)
    return tuple(StepPlan(precision=precision, channels_last=layout) for layout in layouts for precision in chosen)


def with_threads(plan: StepPlan, task: StepTask, machine: Machine) -> tuple[StepPlan, ...]:
    """List a plan with each number of threads worth trying, the plan itself among them, few threads first.

    Few first, since of equals the first is taken, and the loader needs cores too.
    """
    if task.deterministic or not task.leaves_threads:
        return (plan,)
    usual = torch.get_num_threads()
    counts = {machine.physical_cores, machine.logical_cores, machine.physical_cores - 1, usual} - {0}
    return tuple(plan if count == usual else replace(plan, threads=count) for count in sorted(counts))
