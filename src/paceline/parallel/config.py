"""What a user may set about the devices of a run and the ranks on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

_PHASES = ("start", "index", "compile", "step", "evaluation", "checkpoint")


@dataclass(frozen=True, kw_only=True)
class RanksConfig:
    """How many processes train together."""

    devices: int = 0
    """Devices to train on, one process each; 0 takes those that `device` names."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the network and the batch are divided among the devices."""

    parallel: Literal["auto", "data", "fsdp", "pipeline", "hybrid"] = "auto"
    """`data`: a copy of the network on each device; `fsdp`: its parameters are shared out too; `pipeline`: it is cut
    into stages; `hybrid`: several such pipelines. `auto` takes `data`, or what `stages` asks for."""
    stages: int = 0
    """Pieces that the network is cut into, one device each; 0 takes all devices, or 2 under `hybrid`."""
    microbatches: int = 0
    """Parts that each batch goes through the stages in; 0 takes about four per stage."""
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    """Order of work in the stages; `1f1b` keeps fewer activations, `gpipe` runs all forward passes first."""
    bn: str = "local"
    """Images that batch norms normalise over: those of one device (`local`), of all (`sync`), or of so many
    neighbours (`group:8`)."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    """Type in which gradients travel between copies; `bf16` halves what is sent."""

    def relaid(self, asked: ParallelConfig) -> ParallelConfig:
        """Return the settings of a run that goes on: laid out as asked, if anything was, with its own batch norms."""
        return self if asked == ParallelConfig() else replace(asked, bn=self.bn)


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
