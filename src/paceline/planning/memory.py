"""Peak memory: the most that something needed, by torch's allocator on a GPU and by resident memory elsewhere."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil
import torch

from paceline.planning.record import MemoryRecord

_RESET_PEAK = b"5"
"""What the kernel takes, in /proc/self/clear_refs, for forgetting the peak of resident memory (proc(5))."""
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """The peak since the last `forget`; growth is counted from the moment that this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start_bytes = psutil.Process().memory_info().rss
        self.forget()

    def forget(self) -> None:
        """Let the peak be what is in use now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _forget_peak()

    def record(self) -> MemoryRecord:
        """Read the peak; on a GPU all that was allocated counts, elsewhere what the process grew by."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return MemoryRecord(
                kind="allocator",
                peak_bytes=torch.cuda.max_memory_allocated(self._device),
                reserved_bytes=torch.cuda.max_memory_reserved(self._device),
            )
        peak = _peak_bytes()
        return MemoryRecord(kind="resident", peak_bytes=max(peak - self._start_bytes, 0), reserved_bytes=peak)


def _forget_peak() -> None:
    """Let the kernel start the peak anew, where it can; elsewhere it is that of the whole process."""
    try:
        _CLEAR.write_bytes(_RESET_PEAK)
    except OSError:
        return


def _peak_bytes() -> int:
    try:
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
