"""Precision of a run: float32, or autocast to bfloat16 or float16; and what a device may be asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch

from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.training.machine import Machine

PrecisionName = Literal["fp32", "bf16", "fp16"]
Amp = Literal["auto", "off", "bf16", "fp16"]
FP16_LOSS_SCALE = 64.0


@dataclass(frozen=True, kw_only=True)
class Precision:
    """How the network computes; losses, normalisation statistics and weights stay in float32."""

    name: PrecisionName

    @classmethod
    def named(cls, name: str) -> Precision:
        """Return the precision of a name; raises ValueError where there is none."""
        for known in get_args(PrecisionName):
            if name == known:
                return cls(name=known)
        raise ValueError(f"no precision: {name}")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """Type for autocast, None for full precision."""
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]

    @property
    def loss_scale(self) -> float:
        """Factor on the loss sums before backward."""
        return FP16_LOSS_SCALE if self.name == "fp16" else 1.0


def precisions(amp: Amp, machine: Machine, device: torch.device) -> tuple[Precision, ...]:
    """List what the user's choice leaves open on this device, the documented default first.

    That is bfloat16 where the hardware has it, float16 on a GPU that has not, and else float32. Raises UserError
    where the device cannot do what was asked.
    """
    if amp == "fp16" and device.type == "cpu":
        raise UserError("amp=fp16 needs a GPU; use amp=bf16, amp=auto or amp=off on a CPU.")
    if amp == "bf16" and device.type == "cuda" and not machine.bf16:
        raise UserError("This GPU has no bfloat16; use amp=fp16, amp=auto or amp=off.")
    if amp != "auto":
        return (Precision(name="fp32" if amp == "off" else amp),)
    full, brain, half = Precision(name="fp32"), Precision(name="bf16"), Precision(name="fp16")
    if device.type == "cuda":
        return (brain if machine.bf16 else half, full)
    if device.type == "cpu":
        return (brain, full) if machine.bf16 else (full, brain)
    return (full,)
