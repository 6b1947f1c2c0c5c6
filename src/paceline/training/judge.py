"""The judge: has the averaged weights evaluated, at once or beside the training, and knows which are the best."""

from __future__ import annotations

import copy
import logging
import time
from typing import TYPE_CHECKING, Protocol

from paceline.parallel.gather import from_first
from paceline.records import LateEvaluationRecord
from paceline.training.keeper import Best

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module

    from paceline.callbacks import Callback
    from paceline.ledger import Ledger
    from paceline.parallel.parts import Parts
    from paceline.records import EvaluationRecord
    from paceline.training.apart import Apart
    from paceline.training.config import LoopConfig
    from paceline.training.ema import Ema
    from paceline.training.state import TrainingState

log = logging.getLogger("paceline")


class LateRecords(Protocol):
    """Where it is written what was not there with its epoch."""

    def record(self, record: LateEvaluationRecord) -> None:
        """Append to the metrics."""


class Judge:
    """At most one evaluation is on its way; all ranks ask at the same places, and hear the same."""

    def __init__(
        self,
        *,
        evaluate: Callable[[Module], EvaluationRecord],
        apart: Apart | None,
        parts: Parts,
        ema: Ema,
        state: TrainingState,
        elapsed: Callable[[], float],
        records: LateRecords,
        ledger: Ledger,
        config: LoopConfig,
        callbacks: Sequence[Callback],
        best: EvaluationRecord | None = None,
    ) -> None:
        """Take what it judges by.

        evaluate: evaluates a network at once.
        apart: evaluates beside the training instead, all epochs but the last.
        elapsed: seconds of training so far, the same on all ranks.
        best: figures of the best weights of a resumed run.
        """
        self._evaluate = evaluate
        self._apart = apart
        self._parts = parts
        self._ema = ema
        self._state = state
        self._elapsed = elapsed
        self._records = records
        self._ledger = ledger
        self._config = config
        self._callbacks = callbacks
        self._judged = 0
        self.best = best
        """Figures of the best weights."""
        self.longest_s = 0.0
        """The longest time that an evaluation beside the training has taken."""

    def is_due(self) -> bool:
        """Whether the epoch that has ended is one to evaluate."""
        return self._config.val and self._state.epoch % self._config.val_interval == 0

    @property
    def waits(self) -> bool:
        """Whether the training waits for its evaluations."""
        return self._apart is None

    def now(self) -> EvaluationRecord:
        """Evaluate the average as it is."""
        with self._ledger.span("evaluation"):
            evaluation = self._evaluate(self._parts.assemble(self._ema.network))
        self._take(self._state.epoch, evaluation)
        return evaluation

    def beside(self) -> None:
        """Begin to evaluate the average as it is while training goes on."""
        with self._ledger.span("evaluation"):
            self._begin(self._state.epoch, self._parts.assemble(self._ema.network))

    def take_in(self, *, waits: bool) -> Best | None:
        """Judge what was evaluated beside, if the first rank has it; returns its weights if they are the best."""
        if self._apart is None or self._apart.epoch == 0:
            return None
        if waits:
            with self._ledger.span("evaluation_wait"):
                self._apart.wait()
        answer = from_first(self._apart.answer())
        if answer is None:
            return None
        epoch = self._apart.epoch
        with self._ledger.span("evaluation_wait"):
            network = self._apart.take()
        self.longest_s = max(self.longest_s, answer.seconds)
        return self._take_late(epoch, answer.evaluation, answer.seconds, network)

    def begins_again(self, weights: Mapping[str, Tensor]) -> bool:
        """Evaluate what a resumed run was about to when it ended beside the training, where that goes on.

        weights: what it was about, where they are older than the average; else empty. Returns whether it has begun;
        `make_up` is what else to do.
        """
        if self._apart is None or self._state.epoch >= self._state.epochs:
            return False
        self._begin(self._state.awaiting, self._awaited(weights))
        return True

    def make_up(self, weights: Mapping[str, Tensor]) -> Best | None:
        """Evaluate at once what a resumed run was about to; returns its weights if they are the best."""
        network = self._awaited(weights)
        begin = time.perf_counter()
        with self._ledger.span("evaluation"):
            evaluation = self._evaluate(network)
        return self._take_late(self._state.awaiting, evaluation, time.perf_counter() - begin, network)

    def awaiting(self) -> dict[str, Tensor] | None:
        """Return the weights that are being evaluated beside, where they are older than the average."""
        is_older = self._apart is not None and 0 < self._state.awaiting < self._state.epoch
        return self._apart.weights() if is_older and self._apart is not None else None

    def patience_is_spent(self) -> bool:
        """Ask once after each evaluation: between two of them, the next one may be better."""
        patience, judged, best_epoch = self._config.patience, self._judged, self._state.best_epoch
        self._judged = 0
        if patience <= 0 or not self._config.val or judged == 0 or judged - best_epoch < patience:
            return False
        log.info("No better AP for %d epochs; the best was epoch %d.", patience, best_epoch)
        return True

    def close(self) -> None:
        """Stop what is on its way; no thread of it is left."""
        if self._apart is not None:
            self._apart.close()

    def _awaited(self, weights: Mapping[str, Tensor]) -> Module:
        network: Module = self._parts.assemble(self._ema.network)
        if weights:
            network = copy.deepcopy(network)
            network.load_state_dict(weights)
        return network

    def _begin(self, epoch: int, network: Module) -> None:
        assert self._apart is not None
        self._apart.start(epoch, network)
        self._state.awaiting = epoch

    def _take_late(self, epoch: int, evaluation: EvaluationRecord, seconds: float, network: Module) -> Best | None:
        """Judge and record an evaluation that was not there with its epoch."""
        state = self._state
        state.awaiting = 0
        self._take(epoch, evaluation)
        self._records.record(
            LateEvaluationRecord(
                epoch=epoch,
                evaluation=evaluation,
                best_ap=state.best_ap,
                elapsed_s=self._elapsed(),
                seconds=seconds,
            )
        )
        is_best = state.best_epoch == epoch
        return Best(epoch=epoch, evaluation=evaluation, tensors=network.state_dict()) if is_best else None

    def _take(self, epoch: int, evaluation: EvaluationRecord) -> None:
        """See whether the weights of an epoch are the best, and tell the callbacks."""
        state = self._state
        self._judged = epoch
        if state.best_epoch == 0 or evaluation.ap > state.best_ap:
            state.best_ap, state.best_epoch, self.best = evaluation.ap, epoch, evaluation
        with self._ledger.span("callbacks"):
            for callback in self._callbacks:
                callback.on_evaluation(epoch, evaluation)
