"""The machine: which processor or GPU computes, how many cores it has for us, and what it computes natively."""

from __future__ import annotations

import math
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.parallel.launch import physical_cores

_CPU_INFO = Path("/proc/cpuinfo")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Of x86 and, the last, of Arm."""
_NAME_KEYS = ("model name", "CPU implementer", "CPU part")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the speed of a step hangs on besides the step."""

    name: str
    """Model of the GPU, or of the processor."""
    physical_cores: int
    """Cores that this process may use, hyperthreads not among them, and no more than its container's share of time."""
    logical_cores: int
    """The same with hyperthreads."""
    bf16: bool
    """Whether the hardware multiplies bfloat16 itself."""
    fp16: bool
    """Whether training in float16 is an option."""

    @classmethod
    def of(cls, device: torch.device) -> Machine:
        """Look at the machine of a device."""
        quota = quota_of(_QUOTA)
        logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        description = _CPU_INFO.read_text(encoding="utf-8", errors="replace") if _CPU_INFO.exists() else ""
        processor, flags = processor_of(description)
        name, bf16, fp16 = processor, bool(flags & _BF16_FLAGS), False
        if device.type == "cuda":
            name, fp16 = torch.cuda.get_device_name(device), True
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return cls(
            name=name,
            physical_cores=min(physical_cores(), quota),
            logical_cores=min(logical, quota),
            bf16=bf16,
            fp16=fp16,
        )


def processor_of(description: str) -> tuple[str, frozenset[str]]:
    """Read name and feature flags of the first processor out of the text of `/proc/cpuinfo`."""
    first = description.split("\n\n")[0]
    entries = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name = " ".join(entries[key] for key in _NAME_KEYS if key in entries)
    flags = entries.get("flags", entries.get("Features", ""))
    return name or platform.processor() or platform.machine(), frozenset(flags.split())


def quota_of(file: Path) -> int:
    """Cores' worth of time that the container gives, rounded up; a large number where there is no limit."""
    unlimited = 1 << 16
    try:
        most, period = file.read_text(encoding="utf-8").split()
        return unlimited if most == "max" else max(1, math.ceil(int(most) / int(period)))
    except (OSError, ValueError):
        return unlimited
