"""The step: what one batch does to the run, as one call, whoever carries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from paceline.training.optim import update
from paceline.training.schedule import apply_rates

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.ledger import Ledger
    from paceline.losses.detection import LossSums
    from paceline.parallel.engine import Engine
    from paceline.training.ema import Ema
    from paceline.training.optimizer import Optimizer
    from paceline.training.schedule import Rates


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What a step says, on the device; to be read before the next step, which may write over it."""

    sums: LossSums
    """Detached sums of the batch over all ranks."""
    not_finite: Tensor | None
    """0-dim, after an update 1.0 where its gradient was not finite, else 0.0; None where nothing was updated."""


class Step(Protocol):
    """Takes one batch forward and backward, and updates the weights and their average where an update is complete."""

    def __call__(self, batch: Batch, rates: Rates, *, completes: bool) -> StepOutcome:
        """Take a batch on the device; `rates` count where it completes an update. Never waits for the device."""


class EagerStep:
    """Has each operation started by the host as it comes.

    ```
    set_rates   the host's numbers of this update, written into tensors on the device
    run         all the rest: the device alone, the same operations each time, every state at a fixed place in memory
    ```
    """

    def __init__(self, engine: Engine, optimizer: Optimizer, ema: Ema, ledger: Ledger) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.ema = ema
        self.ledger = ledger

    def __call__(self, batch: Batch, rates: Rates, *, completes: bool) -> StepOutcome:
        """Take one batch."""
        if completes:
            self.set_rates(rates)
        return self.run(batch, completes=completes)

    def set_rates(self, rates: Rates) -> None:
        """Tell the device the rates of the update that comes."""
        apply_rates(self.optimizer, rates)
        self.ema.advance()

    def run(self, batch: Batch, *, completes: bool) -> StepOutcome:
        """Do what the device has to do."""
        sums = self.engine.accumulate(batch, completes=completes)
        if not completes:
            return StepOutcome(sums=sums, not_finite=None)
        with self.ledger.span("optimiser", on_device=True):
            not_finite = self.engine.gradient()
            update(self.optimizer, not_finite)
        with self.ledger.span("ema", on_device=True):
            self.ema.take_in()
        return StepOutcome(sums=sums, not_finite=not_finite)

    def state(self) -> list[Tensor]:
        """Return every tensor that `run` changes in place, beside the gradients."""
        networks = (self.engine.network, self.ema.network)
        tensors = [value for network in networks for value in (*network.parameters(), *network.buffers())]
        of_optimizer = [value for entries in self.optimizer.state.values() for value in entries.values()]
        return tensors + self.engine.state() + of_optimizer
