"""Resident: memory of this process that is in use, its peak, and what it can give back."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import psutil

if sys.platform != "win32":
    import resource

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
"""What Linux takes for forgetting the peak so far (proc(5))."""
_MOST_MAPPED, _KEPT_AT_THE_TOP = -4, -1
"""Numbers of M_MMAP_MAX and M_TRIM_THRESHOLD (mallopt(3))."""
_NEVER = -1
"""A threshold that nothing reaches; any other has 31 bits, which a step may free more than."""


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
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def give_back() -> None:
    """Let the C library return memory that was freed; nothing where it knows no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)


def keep_freed() -> None:
    """Let the C library keep memory that is freed, pieces of any size, for what comes next.

    By itself it returns each large one to the system, which clears every page of the next one anew: a tenth of a
    training step on a CPU. `give_back` returns it all the same. Does nothing where the environment has tuned it.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        tune = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    tune(_MOST_MAPPED, 0)
    tune(_KEPT_AT_THE_TOP, _NEVER)


def _kept_by_linux() -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
