"""Peak: the most memory that a piece of work takes, of a GPU or of the host."""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING, Protocol

import torch

from paceline.data.room import free_memory_bytes
from paceline.resident import forget_peak, give_back, peak_bytes, resident_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

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
        self._exact = forget_peak()

    def held_bytes(self) -> int:
        """Return what is resident now, when what nobody uses has been given back."""
        gc.collect()
        give_back()
        return resident_bytes()

    def free_bytes(self) -> int:
        """Return what the machine, and the container, have left."""
        return free_memory_bytes()

    def of(self, work: Callable[[], None]) -> int:
        """Do the work to its end; returns the most that was resident meanwhile."""
        self.held_bytes()
        if self._exact and forget_peak():
            work()
            return peak_bytes()
        return self._sampled(work)

    def _sampled(self, work: Callable[[], None]) -> int:
        most, ended = [0], threading.Event()

        def look() -> None:
            while True:
                most[0] = max(most[0], resident_bytes())
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
