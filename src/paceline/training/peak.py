"""Peak: the most memory that a piece of work takes, of a GPU or of the host."""

from __future__ import annotations

import ctypes
import gc
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

from paceline.data.room import free_memory_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_CLEAR_PEAK = "5"
_SAMPLE_S = 0.002


class Peak(Protocol):
    """Watches the memory of this process at one place. Bytes are all that it holds there, not what was added."""

    def held_bytes(self) -> int:
        """Return what is held now, when what nobody uses has been given back."""

    def free_bytes(self) -> int:
        """Return what could be taken besides."""

    def of(self, work: Callable[[], None]) -> int:
        """Do the work to its end; returns the most that was held meanwhile. Raises what the work raises."""


class DevicePeak:
    """Of a GPU: what torch's allocator has reserved, its gaps included, since nobody else can use those."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def held_bytes(self) -> int:
        """Return what is held now, when what nobody uses has been given back."""
        gc.collect()
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def free_bytes(self) -> int:
        """Return what the driver says is free."""
        return torch.cuda.mem_get_info(self._device)[0]

    def of(self, work: Callable[[], None]) -> int:
        """Do the work to its end; returns the most that was reserved meanwhile."""
        self.held_bytes()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)


class HostPeak:
    """Of the host: resident memory, whose peak Linux keeps and starts anew when asked.

    That counts what libraries take beside torch, too, which no count of tensors does (see docs/decisions/0053). Where
    the peak cannot be started anew, a thread looks every 2 ms.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._exact = _start_anew()

    def held_bytes(self) -> int:
        """Return what is resident now, when what nobody uses has been given back."""
        gc.collect()
        _give_back()
        return int(self._process.memory_info().rss)

    def free_bytes(self) -> int:
        """Return what the machine, and the container, have left."""
        return free_memory_bytes()

    def of(self, work: Callable[[], None]) -> int:
        """Do the work to its end; returns the most that was resident meanwhile."""
        self.held_bytes()
        if self._exact and _start_anew():
            work()
            return _peak_bytes()
        return self._sampled(work)

    def _sampled(self, work: Callable[[], None]) -> int:
        most, ended = [0], threading.Event()

        def look() -> None:
            while True:
                most[0] = max(most[0], int(self._process.memory_info().rss))
                if ended.wait(_SAMPLE_S):
                    return

        thread = threading.Thread(target=look, name="paceline-peak", daemon=True)
        thread.start()
        try:
            work()
        finally:
            ended.set()
            thread.join()
        return most[0]


def peak_of(device: torch.device) -> Peak:
    """Return what watches the memory that a network on this device takes."""
    return DevicePeak(device) if device.type == "cuda" else HostPeak()


def _start_anew() -> bool:
    """Let Linux forget the peak so far; False where it does not."""
    try:
        _CLEAR.write_text(_CLEAR_PEAK)
        _peak_bytes()
    except (OSError, ValueError, StopIteration):
        return False
    return True


def _peak_bytes() -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def _give_back() -> None:
    """Let the C library return memory that was freed; nothing where it knows no such call."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return
    trim(0)
