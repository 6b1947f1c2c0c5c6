"""Plan of the step: how a training step is carried out on this machine, without changing what it computes."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline.training.precision import Precision
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What was chosen for the step of a run; see `paceline.training.choice`."""

    precision: Precision
    channels_last: bool = True
    """Whether the network's weights, and with them its activations, lie in memory with the channels innermost."""
    compile: bool = False
    """Whether the nodes that compute, and on GPUs the loss, are compiled; see `paceline.training.compiling`."""
    graphs: bool = False
    """Whether the whole step is captured in CUDA graphs."""
    kernels: bool = True
    """Whether our own kernels take their part of it, where a device can run them."""
    threads: int = 0
    """Threads within an operation on a CPU; 0 as torch has them."""

    def __str__(self) -> str:
        parts = [self.precision.name, "channels-last" if self.channels_last else "channels-first"]
        parts += ["compiled"] if self.compile else []
        parts += ["graphs"] if self.graphs else []
        parts += [] if self.kernels else ["without kernels"]
        parts += [f"{self.threads} {'thread' if self.threads == 1 else 'threads'}"] if self.threads else []
        return " ".join(parts)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> StepPlan:
        """Read back what `dataclasses.asdict` gave. Raises ValueError, TypeError or KeyError for anything else."""
        plan = cls(
            precision=Precision.named(values["precision"]["name"]),
            **{entry.name: values[entry.name] for entry in fields(cls) if entry.name != "precision"},
        )
        switches = (plan.channels_last, plan.compile, plan.graphs, plan.kernels)
        if any(type(value) is not bool for value in switches) or type(plan.threads) is not int or plan.threads < 0:
            raise ValueError(f"no plan: {values}")
        return plan


def laid_out(network: M, *, channels_last: bool) -> M:
    """Lay the weights of a network out in memory, in place; returns the same network."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return network.to(memory_format=memory_format)  # type: ignore[call-overload, no-any-return]


def kernels_of(plan: StepPlan) -> AbstractContextManager[None]:
    """Let this thread's steps be taken with kernels, or without them, as a plan says."""
    return nullcontext() if plan.kernels else kernels_left_out()


@contextmanager
def carrying_out(plan: StepPlan) -> Iterator[None]:
    """Take the steps of this thread with the threads of a plan, and with or without kernels."""
    with threads_of(plan), kernels_of(plan):
        yield


@contextmanager
def threads_of(plan: StepPlan) -> Iterator[None]:
    """Compute with the threads of a plan; afterwards with as many as before."""
    before = torch.get_num_threads()
    if plan.threads:
        torch.set_num_threads(plan.threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
