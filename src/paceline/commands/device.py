"""The device of a run."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from paceline.errors import UserError
from paceline.resident import keep_freed

if TYPE_CHECKING:
    from collections.abc import Iterator

M = TypeVar("M", bound=torch.nn.Module)


def resolve_device(text: str, *, local_rank: int = 0, local_world: int = 1) -> torch.device:
    """Turn `auto`, `cpu`, `cuda`, `cuda:1`, a GPU's number, or one per rank (`0,1`) into the device of a rank.

    Raises UserError when there is no such device.
    """
    name = text.strip().lower()
    several = [part for part in name.split(",") if part]
    if len(several) > 1 or local_world > 1:
        name = _device_of_rank(several, local_rank, local_world)
    if name in {"auto", ""}:
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if name == "cpu":
        return torch.device("cpu")
    number = name.removeprefix("cuda").removeprefix(":") or "0"
    if not number.isdecimal():
        raise UserError(f"device={text} is not known; write auto, cpu, cuda or the number of a GPU.")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number) >= count:
        found = f"{count} GPU{'s' if count != 1 else ''}" if count else "no GPU that PyTorch can use"
        if not count and torch.version.cuda is None and torch.version.hip is None:
            found += " (this build of PyTorch is for CPUs alone)"
        mend = f"the last one is {count - 1}" if count else "use device=cpu"
        raise UserError(f"device={text} asks for GPU {number}, but this machine has {found}; {mend}.")
    return torch.device("cuda", int(number))


def make_current(device: torch.device) -> torch.device:
    """Let this thread work on a device wherever none is named, as where a kernel is launched; returns it.

    Without it every process of a machine would have a context on its first GPU too. On a CPU the maps of a step come to
    lie where those of the last one lay.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        keep_freed()
    return device


def count_devices(text: str, devices: int) -> int:
    """Count the ranks that `device` and `devices` ask for; raises UserError where they do not go together."""
    named = len([part for part in text.split(",") if part])
    if named > 1 and devices not in (0, named):
        raise UserError(f"device={text} names {named} devices and devices={devices} asks for another number; drop one.")
    if named == 1 and devices > 1 and text.removeprefix("cuda:").isdecimal():
        raise UserError(f"device={text} names one GPU and devices={devices} asks for more; name them all: device=0,1.")
    if devices > 1 and named <= 1 and text != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if devices > count:
            raise UserError(f"devices={devices} asks for more than the {count} GPUs of this machine.")
    return devices or max(named, 1)


def backend_of(text: str) -> str:
    """Name the way in which ranks on these devices talk to each other; two ranks on one GPU cannot by NCCL."""
    named = [part for part in text.split(",") if part]
    if text == "cpu" or not torch.cuda.is_available() or len(set(named)) < len(named):
        return "gloo"
    return "cpu:gloo,cuda:nccl"


def _device_of_rank(several: list[str], local_rank: int, local_world: int) -> str:
    """Choose a rank's device of those that were named, or by its number."""
    if len(several) <= 1:
        word = several[0] if several else "auto"
        gpus = word in {"auto", "cuda"} and torch.cuda.is_available()
        return str(local_rank) if gpus else word
    if local_rank >= len(several) or local_world != len(several):
        names = ",".join(several)
        if local_world == 1:
            raise UserError(f"device={names} names several devices, which only training uses; name one.")
        raise UserError(f"device={names} names {len(several)} devices for {local_world} processes; name one for each.")
    return several[local_rank]


def place(network: M, device: torch.device) -> M:
    """Move a network to the device, its convolutions laid out channels-last; returns the same network."""
    return network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def describe_device(device: torch.device) -> str:
    """Name the device for a person."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    threads = torch.get_num_threads()
    return f"CPU, {threads} {'thread' if threads == 1 else 'threads'}"


@contextmanager
def deterministic_algorithms(*, alone: bool) -> Iterator[None]:
    """Let this process use algorithms `alone` that give the same bits every time, even where they are slower.

    Afterwards it uses what it did before, but for the room that cuBLAS works in, which is settled once in a process.
    """
    if not alone:
        yield
        return
    of_torch: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = of_torch.fill_uninitialized_memory
    torch.use_deterministic_algorithms(mode=True)
    of_torch.fill_uninitialized_memory = False
    # By cuBLAS's manual it takes a workspace of a settled size for that; graphs are recorded on a stream of their own.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        of_torch.fill_uninitialized_memory = filled
