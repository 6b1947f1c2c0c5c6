"""Numerical precision of the step, chosen by a short measurement on the device that will train."""

from __future__ import annotations

import copy
import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from paceline.errors import UserError

if TYPE_CHECKING:
    from torch.nn import Module

log = logging.getLogger("paceline")

PrecisionName = Literal["fp32", "bf16", "fp16"]
FP16_LOSS_SCALE = 64.0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the network computes; losses, normalisation statistics and weights stay in float32."""

    name: PrecisionName

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Type for autocast, None for full precision."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    @property
    def loss_scale(self) -> float:
        """Factor on the loss sums before backward."""
        return FP16_LOSS_SCALE if self.name == "fp16" else 1.0


def choose_precision(
    amp: Literal["auto", "off", "bf16", "fp16"], network: Module, *, device: torch.device, imgsz: int, batch: int
) -> Precision:
    """Return what the user asked for, or under `auto` the fastest of what the device has, measured on the network.

    Raises UserError where the device cannot do what was asked.
    """
    if amp == "off":
        return Precision(name="fp32")
    if amp == "fp16" and device.type == "cpu":
        raise UserError("amp=fp16 needs a GPU; use amp=bf16, amp=auto or amp=off on a CPU.")
    if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("This GPU has no bfloat16; use amp=fp16, amp=auto or amp=off.")
    if amp != "auto":
        return Precision(name=amp)
    candidates = _candidates(device)
    if len(candidates) == 1:
        return candidates[0]
    milliseconds = _measure(candidates, network, device=device, imgsz=imgsz, batch=min(batch, 4))
    chosen = min(candidates, key=lambda candidate: milliseconds[candidate.name])
    figures = ", ".join(f"{name} {value:.0f} ms" for name, value in milliseconds.items())
    log.info("Precision %s, the fastest for %d images of %d px: %s.", chosen.name, min(batch, 4), imgsz, figures)
    return chosen


def _candidates(device: torch.device) -> list[Precision]:
    if device.type == "cuda":
        half = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        return [Precision(name="fp32"), Precision(name="bf16" if half == "bf16" else "fp16")]
    if device.type == "cpu":
        return [Precision(name="fp32"), Precision(name="bf16")]
    return [Precision(name="fp32")]


def _measure(
    candidates: list[Precision], network: Module, *, device: torch.device, imgsz: int, batch: int, rounds: int = 5
) -> dict[str, float]:
    """Least milliseconds of forward and backward per candidate, taken in turn on a copy of the network.

    The least, since other work on the machine can only make a run slower.
    """
    copied = copy.deepcopy(network).train()
    images = torch.zeros(batch, 3, imgsz, imgsz, device=device).to(memory_format=torch.channels_last)

    def run(precision: Precision) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=precision.amp_dtype, enabled=precision.amp_dtype is not None):
            outputs = copied(images)
        sum(output.float().sum() for output in outputs).backward()
        copied.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1000

    for precision in candidates:
        run(precision)
    times = {precision.name: [] for precision in candidates}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for precision in candidates:
            times[precision.name].append(run(precision))
    return {name: min(values) for name, values in times.items()}
