"""The state of a run: the one object of training that changes, and all that a resumed run has to know."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(kw_only=True)
class TrainingState:
    """Counters; tensors are kept by their owners (network, EMA, optimiser)."""

    epochs: int
    """Epochs that the run is to have; a time budget changes it on the way."""
    epoch: int = 0
    """Finished epochs."""
    step: int = 0
    """Finished steps, which is also the place in the stream of samples."""
    updates: int = 0
    """Optimiser updates."""
    steps_since_update: int = 0
    """Steps whose gradients wait for the next update."""
    best_ap: float = -1.0
    best_epoch: int = 0
    elapsed_s: float = 0.0
    """Seconds of training so far, over all parts of a resumed run."""
    skipped_updates: int = 0
    """Updates left out because the gradient was not finite."""
    awaiting: int = 0
    """Epoch whose weights were being evaluated when this was saved; 0 for none."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingState:
        """Rebuild from a checkpoint."""
        return cls(**values)
