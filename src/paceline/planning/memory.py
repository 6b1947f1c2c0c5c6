"""Peak memory: the most that something needed, by torch's allocator on a GPU and by resident memory elsewhere."""

from __future__ import annotations

import torch

from paceline.planning.record import MemoryRecord
from paceline.resident import forget_peak, give_back, peak_bytes, resident_bytes


class PeakMemory:
    """The peak since the last `forget`; growth is counted from the moment that this is made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type != "cuda":
            give_back()  # else what comes may live on what others have left
        self._start_bytes = resident_bytes()
        self.forget()

    def forget(self) -> None:
        """Let the peak be what is in use now."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            forget_peak()

    def record(self) -> MemoryRecord:
        """Read the peak; on a GPU all that was allocated counts, elsewhere what the process grew by."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return MemoryRecord(
                kind="allocator",
                peak_bytes=torch.cuda.max_memory_allocated(self._device),
                reserved_bytes=torch.cuda.max_memory_reserved(self._device),
            )
        peak = peak_bytes()
        return MemoryRecord(kind="resident", peak_bytes=max(peak - self._start_bytes, 0), reserved_bytes=peak)
