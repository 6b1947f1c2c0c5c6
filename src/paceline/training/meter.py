"""The loss meter: sums on the device, read by the host only when it costs nothing or when the epoch is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.records import LossRecord

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.losses.detection import LossSums


class LossMeter:
    """Adds up the loss sums of an epoch; figures are sum of parts / max(sum of normalisers, 1)."""

    def __init__(self, device: torch.device, *, read_every: int = 50) -> None:
        """Start at zero; on devices other than the CPU the host looks at the losses once in `read_every` steps."""
        self._device = device
        self._read_every = read_every
        self._on_host = torch.zeros(4, pin_memory=device.type == "cuda")
        self._reset()

    def _reset(self) -> None:
        self._steps = 0
        self._total = torch.zeros(4, device=self._device)
        self._latest: LossRecord | None = None
        self._copied: torch.cuda.Event | None = None

    def add(self, sums: LossSums) -> None:
        """Take in one batch; never waits for the device."""
        self._total = self._total + torch.stack([sums.box, sums.cls, sums.dfl, sums.normaliser]).to(torch.float32)
        self._steps += 1
        if self._device.type == "cpu":
            self._latest = _record(self._total)
            return
        if self._copied is not None and self._copied.query():  # type: ignore[no-untyped-call]
            self._latest = _record(self._on_host)
            self._copied = None
        if self._copied is None and self._steps % self._read_every == 1:
            self._on_host.copy_(self._total, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def latest(self) -> LossRecord | None:
        """Mean of the epoch so far as the host last saw it, or None."""
        return self._latest

    def close(self) -> LossRecord:
        """Read the epoch's mean, waiting for the device, and start afresh."""
        record = _record(self._total)
        self._reset()
        return record


def _record(total: Tensor) -> LossRecord:
    box, cls, dfl, normaliser = total.tolist()
    divisor = max(normaliser, 1.0)
    return LossRecord(box=box / divisor, cls=cls / divisor, dfl=dfl / divisor)
