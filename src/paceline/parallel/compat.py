"""Everything that differs between the versions of torch that Paceline works with (2.11 and 2.13)."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from torch.distributed.launcher.api import LaunchConfig
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor, nn
    from torch.distributed import ProcessGroup


def distributed_data_parallel(module: nn.Module, group: ProcessGroup, **options: Any) -> DistributedDataParallel:
    """Wrap a module without any broadcast of its buffers: 2.13 renamed the option and warns of the old name."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options[name] = False
    if "batched_grad_copy" in parameters:  # gradients go into their bucket together; 2.11 copies one by one
        options["batched_grad_copy"] = True
    return DistributedDataParallel(module, process_group=group, **options)


def pipeline_stage(
    module: nn.Module,
    *,
    index: int,
    stages: int,
    device: torch.device,
    takes: tuple[Tensor, ...],
    gives: tuple[Tensor, ...],
    group: ProcessGroup,
) -> PipelineStage:
    """Make a stage whose shapes are known: otherwise torch runs the network once more, in training, to find them."""
    return PipelineStage(module, index, stages, device, input_args=takes, output_args=gives, group=group)


def pipeline_schedule(
    name: Literal["gpipe", "1f1b"],
    stage: PipelineStage,
    *,
    microbatches: int,
    loss: Callable[[Any, Tensor], Tensor],
) -> ScheduleGPipe | Schedule1F1B:
    """Make a schedule that adds gradients up and divides them by nothing."""
    kind = ScheduleGPipe if name == "gpipe" else Schedule1F1B
    return kind(stage, microbatches, loss_fn=loss, scale_grads=False)


def run_schedule(schedule: ScheduleGPipe | Schedule1F1B, images: tuple[Tensor, ...], target: Tensor | None) -> None:
    """Run one batch; the outputs are not kept where torch can be told so."""
    options: dict[str, Any] = {"return_outputs": False} if _can_drop_outputs(type(schedule)) else {}
    if target is not None:
        options |= {"target": target, "losses": []}
    schedule.step(*images, **options)


def launch_config(*, stop_s: int, **settings: Any) -> LaunchConfig:
    """Say how ranks are launched; 2.11 gives them 30 s to end and cannot be told otherwise."""
    if "shutdown_timeout" in inspect.signature(LaunchConfig).parameters:
        settings["shutdown_timeout"] = stop_s
    return LaunchConfig(**settings)


@cache
def _can_drop_outputs(schedule: type) -> bool:
    return "return_outputs" in inspect.signature(schedule.step).parameters  # type: ignore[attr-defined]
