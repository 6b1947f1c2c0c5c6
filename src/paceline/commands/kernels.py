"""Kernels on trial: whether a run, all its ranks, may use ours on its GPUs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from paceline.training.acceptance import objection
from paceline.training.machine import Machine
from paceline.training.precision import precisions
from paceline.triton_kernels import SWITCH, distrust

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion
    from paceline.parallel.process_group import ProcessGroup
    from paceline.training.precision import Amp

log = logging.getLogger("paceline")


def try_kernels(network: DetectionModel, criterion: Criterion, amp: Amp, group: ProcessGroup) -> None:
    """Leave all to torch, on all ranks, where kernels compute something else on the GPU of one of them; it is logged.

    Raises UserError where the device cannot do what `amp` asks for.
    """
    device = next(network.parameters()).device
    if device.type != "cuda":
        return
    precision = precisions(amp, Machine.of(device), device)[0]
    with group.first_on_node("kernels on trial"):
        reason = objection(network, criterion, precision)
    if reason:
        log.warning(
            "Our kernels are not used on this %s: %s. Torch's take their place and are slower; please report this. "
            "%s=off goes without kernels and without the trial.",
            torch.cuda.get_device_name(device),
            reason,
            SWITCH,
        )
    if group.any("kernels objected to", bool(reason)):
        distrust(device)
