"""Resident: memory of this process that is in use, its peak, and what it can give back."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import psutil

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
"""What Linux takes for forgetting the peak so far (proc(5))."""


def resident_bytes() -> int:
    """Return what is in use now, with what the C library keeps for later."""
    return int(psutil.Process().memory_info().rss)


def forget_peak() -> bool:
    """Let Linux start the peak anew from now; False where it does not, and it stays that of the whole process."""
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
    except OSError:
        return False
    return _kept_by_linux() is not None


def peak_bytes() -> int:
    """Return the most that was in use since `forget_peak`."""
    kept = _kept_by_linux()
    if kept is not None:
        return kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Let the C library return memory that was freed; nothing where it knows no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


def _kept_by_linux() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
