"""The device of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel


def resolve_device(text: str) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1` or a GPU's number into a device.

    Raises UserError when there is no such device.
    """
    name = text.strip().lower()
    if name in {"auto", ""}:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdecimal():
        raise UserError(f"device={text!r} is not known; write auto, cpu, cuda or the number of a GPU.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number) >= count:
        found = f"{count} GPU{'s' if count != 1 else ''}" if count else "no GPU that PyTorch can use"
        raise UserError(f"device={text!r} asks for GPU {number}, but this machine has {found}; use device=cpu.")
    return torch.device("cuda", int(number))


def place(network: DetectionModel, device: torch.device) -> DetectionModel:
    """Move a network to the device, its convolutions laid out channels-last; returns the same network."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def describe_device(device: torch.device) -> str:
    """Name the device for a person."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"CPU, {torch.get_num_threads()} threads"
