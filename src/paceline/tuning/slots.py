"""Slots: the places where trials run side by side, one device or one group of cores each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_ON_CPU = 8


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for one trial at a time."""

    device: str
    """As in `device=` of a run."""
    cores: tuple[int, ...]
    """Numbers of the cores that the trial's process may use."""

    @property
    def name(self) -> str:
        """How tables call it."""
        listed = f"{self.cores[0]}-{self.cores[-1]}" if len(self.cores) > 1 else str(self.cores[0])
        return f"cores {listed}" if self.device == "cpu" else f"cuda:{self.device}"


def divide(devices: Sequence[str], cores: Sequence[int], cores_per_trial: int) -> list[Slot]:
    """Give each GPU its share of the cores, or cut the cores into groups where `devices` is `cpu` alone.

    `cores_per_trial` 0 divides evenly between GPUs; on a CPU it takes one core a trial, or an eighth of them where
    there are more than eight. Raises UserError where there are too few cores.
    """
    assert devices
    assert cores
    if cores_per_trial > len(cores):
        raise UserError(
            f"cores_per_trial is {cores_per_trial}, but there are {len(cores)} cores; give at most that many."
        )
    if list(devices) == ["cpu"]:
        width = cores_per_trial or max(1, len(cores) // _MOST_ON_CPU)
        starts = range(0, len(cores) - width + 1, width)
        return [Slot(device="cpu", cores=tuple(cores[start : start + width])) for start in starts]
    width = cores_per_trial or max(1, len(cores) // len(devices))
    groups = max(1, len(cores) // width)
    return [
        Slot(device=device, cores=tuple(cores[width * (place % groups) : width * (place % groups + 1)]))
        for place, device in enumerate(devices)
    ]
