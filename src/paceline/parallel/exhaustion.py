"""Exhaustion: what it looks like when memory runs out."""

from __future__ import annotations

import re

import torch

_SIGNS = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad_alloc|(CUDNN|CUBLAS)_STATUS_ALLOC_FAILED", re.IGNORECASE
)
"""What torch's other errors say where an allocation failed below it: in its CPU allocator, the driver, or a library."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on the device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _SIGNS.search(str(error)) is not None


def describe_memory(device: torch.device) -> str:
    """Say how much memory a GPU has, and how much of it is others'; of a host, only that it is the host's."""
    if device.type != "cuda":
        return "the memory of this machine"
    free, total = torch.cuda.mem_get_info(device)
    others = max(total - free - torch.cuda.memory_reserved(device), 0)
    return f"the {total / 1e9:.1f} GB of {device}, of which {others / 1e9:.1f} GB are not this process's to take"
