"""What a user may set about the devices of a run and the ranks on them."""

from __future__ import annotations

from dataclasses import dataclass

_PHASES = ("start", "index", "compile", "step", "evaluation", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """How many processes train together."""

    devices: int = 0
    """Devices to train on, one process each; 0 takes those that `device` names."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """How long the ranks of a run may take, in seconds, before all of them are ended; 0 sets no limit."""

    limit_start: float = 600.0
    """Until all ranks have come and the network is built."""
    limit_index: float = 7200.0
    """To read the data set."""
    limit_compile: float = 1800.0
    """For the first step, in which kernels are chosen and compiled."""
    limit_step: float = 300.0
    """For one step, the wait for its batch among it."""
    limit_evaluation: float = 3600.0
    """For one evaluation."""
    limit_checkpoint: float = 1200.0
    """To write a checkpoint, and the pictures at the end."""
    limit_silence: float = 15.0
    """Without any sign of life from a rank."""

    def of(self, phase: str) -> float:
        """Seconds that a phase may take."""
        limit: float = getattr(self, self.option(phase))
        return limit

    @staticmethod
    def option(phase: str) -> str:
        """Name of the option that limits a phase."""
        return f"limit_{phase if phase in _PHASES else 'checkpoint'}"
