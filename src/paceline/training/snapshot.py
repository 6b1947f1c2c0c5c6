"""The snapshot: copies of tensors on the host, taken without waiting for the device, in memory that is used again."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class HostSnapshot:
    """Copies of one set of tensors at a time: taking the next one overwrites the one before.

    ```
    host     | take |  steps ...                  | take |
    device   ...step N |copies to pinned memory| step N + 1 ...       the copies stand in the stream's order
    writer              wait ......... read the copies                 from another thread
    ```
    On a CPU the copies are made at once, and there is nothing to wait for.
    """

    def __init__(self) -> None:
        self._copies: dict[str, Tensor] = {}
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copy tensors, which may change at once afterwards; `wait` has to come before the copies are read."""
        copies = {key: self._copy_of(key, value.detach()) for key, value in tensors.items()}
        self._copies = copies
        devices = {value.device for value in tensors.values() if value.device.type == "cuda"}
        if devices:
            (device,) = devices
            with torch.cuda.device(device):
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._copied.record()
        return copies

    def wait(self) -> None:
        """Wait until the copies are made; may be called from another thread."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None

    def _copy_of(self, key: str, value: Tensor) -> Tensor:
        copy = self._copies.get(key)
        if copy is None or copy.shape != value.shape or copy.dtype != value.dtype:
            copy = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.device.type == "cuda")
        return copy.copy_(value, non_blocking=True)
