"""The training loop, as it reads aloud: wait for a batch, forward and backward, update, count, record."""

from __future__ import annotations

import copy
import logging
import time
from typing import TYPE_CHECKING, Protocol

from paceline.errors import UserError
from paceline.records import EndRecord, EpochRecord, LateEvaluationRecord, StepRecord
from paceline.training.keeper import Best
from paceline.training.meter import LossMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import torch
    from torch import Tensor
    from torch.nn import Module

    from paceline.batch import Batch
    from paceline.callbacks import Callback
    from paceline.ledger import Ledger
    from paceline.parallel.engine import Engine
    from paceline.records import EvaluationRecord
    from paceline.training.apart import Apart
    from paceline.training.budget import Budget
    from paceline.training.config import LoopConfig
    from paceline.training.ema import Ema
    from paceline.training.schedule import Rates, Schedule
    from paceline.training.state import TrainingState
    from paceline.training.step import Step

log = logging.getLogger("paceline")

MOST_LOST = 20
"""Updates left out, in epochs in a row that lose half of theirs or more, of a training that has diverged."""


class TrainingData(Protocol):
    """Where batches come from."""

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks."""

    def steps(self, epoch: int) -> int:
        """Count the batches of this epoch (from 0)."""

    def epoch(self, epoch: int, *, mosaic: bool) -> Iterator[Batch]:
        """Yield the batches of this epoch, in order."""

    def stats(self) -> dict[str, float]:
        """Seconds and counts of the loader's threads since the start."""


class Keeper(Protocol):
    """What an epoch leaves on disk."""

    @property
    def folder(self) -> Path:
        """The run folder."""

    def save(
        self,
        state: TrainingState,
        evaluation: EvaluationRecord | None,
        *,
        best: Best | None = None,
        awaiting: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Have the checkpoint of a finished epoch written while training goes on."""

    def wait(self) -> None:
        """Wait for the files of the save before, as has to be done before the next; raises what went wrong."""

    def close(self) -> None:
        """Wait where the run ends early."""

    def record(self, record: EpochRecord | LateEvaluationRecord) -> None:
        """Append to the metrics."""


class Preempted(Exception):  # noqa: N818 - it is no error
    """The run was asked to stop, and all its ranks have taken the same last step."""


class Loop:
    """One run over its epochs. Everything it needs is an object that is called at a named place."""

    def __init__(
        self,
        *,
        engine: Engine,
        step: Step,
        schedule: Schedule,
        ema: Ema,
        data: TrainingData,
        evaluate: Callable[[Module], EvaluationRecord],
        keeper: Keeper,
        state: TrainingState,
        budget: Budget,
        ledger: Ledger,
        config: LoopConfig,
        close_mosaic: int,
        device: torch.device,
        callbacks: Sequence[Callback],
        frozen: Sequence[Module] = (),
        best: EvaluationRecord | None = None,
        stops: Callable[[int], bool] = lambda step: False,
        apart: Apart | None = None,
        awaited: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take what the run is made of.

        evaluate: evaluates a network at once.
        apart: evaluates beside the training instead, all epochs but the last.
        awaited: of a resumed run, the weights that `state.awaiting` is about, where they are older than the average.
        """
        self._engine = engine
        self._step = step
        self._schedule = schedule
        self._ema = ema
        self._data = data
        self._evaluate = evaluate
        self._keeper = keeper
        self._state = state
        self._budget = budget
        self._ledger = ledger
        self._config = config
        self._close_mosaic = close_mosaic
        self._device = device
        self._callbacks = callbacks
        self._meter = LossMeter(device)
        self._frozen = frozen
        self._best = best
        self._stops = stops
        self._apart = apart
        self._awaited = awaited
        self._judged = 0
        self._lost = 0
        self._longest_evaluation_s = 0.0
        self._background_before: dict[str, float] = {}

    def run(self) -> EndRecord:
        """Train until the epochs, the patience or the time budget are spent, or the run is asked to stop.

        When it returns or raises, checkpoints are written and no thread of it is left.
        """
        try:
            reason = self._run_epochs()
            self._keeper.wait()
        finally:
            if self._apart is not None:
                self._apart.close()
            self._keeper.close()
        return EndRecord(
            folder=self._keeper.folder,
            reason=reason,
            epochs=self._state.epoch,
            best_epoch=self._state.best_epoch,
            best=self._best,
            wall_s=self._state.elapsed_s,
        )

    def _run_epochs(self) -> str:
        """Return why it ended."""
        self._ledger.lap()
        self._evaluate_what_was_left()
        while self._state.epoch < self._state.epochs:
            try:
                if self._run_epoch():
                    return "stopped early"
            except Preempted:
                return "preempted"
        return "time budget spent" if self._budget.is_set else "finished"

    def _run_epoch(self) -> bool:
        """Train, evaluate, save and record one epoch; returns whether patience is spent."""
        state = self._state
        images, train_s, rates = self._train()
        state.epoch += 1
        with self._ledger.span("device_wait"):
            loss = self._meter.close()
        self._engine.parts.settle(self._engine.network, self._ema.network)
        is_due = self._config.val and state.epoch % self._config.val_interval == 0
        best = self._take_in(waits=is_due)
        evaluation = self._evaluate_average() if is_due and self._apart is None else None
        state.epochs = self._budget.epochs(
            state, spent_s=self._seconds_since_start(), reserve_s=self._longest_evaluation_s
        )
        stops = self._patience_is_spent()
        if stops or state.epoch >= state.epochs:
            best = self._take_in(waits=True) or best
            if evaluation is None and (is_due or state.epoch >= state.epochs):
                evaluation = self._evaluate_average()
        elif is_due and self._apart is not None:
            self._evaluate_apart()
        if evaluation is not None and state.best_epoch == state.epoch:
            best = Best(epoch=state.epoch, evaluation=evaluation)
        self._save(evaluation, best, waits=stops or state.epoch >= state.epochs)
        lap = self._ledger.lap()
        record = EpochRecord(
            epoch=state.epoch,
            epochs=state.epochs,
            step=state.step,
            images=images,
            wall_s=lap.wall_s,
            elapsed_s=state.elapsed_s,
            train_images_per_s=images / train_s if train_s > 0 else 0.0,
            learning_rate=rates.lr,
            loss=loss,
            evaluation=evaluation,
            best_ap=state.best_ap,
            spans_s=lap.spans_s,
            device_ms=lap.device_ms,
            background_s=self._background(),
            counters={"updates": state.updates, "skipped_updates": state.skipped_updates},
        )
        self._keeper.record(record)
        with self._ledger.span("callbacks"):
            for callback in self._callbacks:
                callback.on_epoch(record)
        return stops

    def _train(self) -> tuple[int, float, Rates]:
        """Take every step of one epoch; returns images, seconds and the last rates."""
        state, ledger = self._state, self._ledger
        mosaic = state.epoch < state.epochs - self._close_mosaic
        steps = self._data.steps(state.epoch)
        self._engine.network.train()
        for module in self._frozen:
            module.eval()
        start = time.perf_counter()
        updates_before = state.updates
        images, skipped, rates = 0, None, self._schedule.rates(state.epoch, state.epochs)
        batches = self._data.epoch(state.epoch, mosaic=mosaic)
        for number, batch in enumerate(ledger.each("data", batches), start=1):
            step_start = time.perf_counter()
            with ledger.span("transfer", on_device=True):
                batch = batch.to(self._device, non_blocking=True)
            place = state.epoch + number / steps
            rates = self._schedule.rates(place, state.epochs)
            is_end = number == steps and state.epoch + 1 >= state.epochs
            completes = state.steps_since_update + 1 >= self._schedule.accumulation(place) or is_end
            outcome = self._step(batch, rates, completes=completes)
            self._meter.add(outcome.sums)
            if outcome.not_finite is not None:  # the next step writes over it
                skipped = outcome.not_finite.clone() if skipped is None else skipped + outcome.not_finite
            self._count_step(completes=completes)
            images += self._data.batch_size
            self._report_step(number, steps, self._data.batch_size, step_start)
            if self._stops(state.step):
                raise Preempted
        if skipped is not None:
            self._count_skipped(skipped, state.updates - updates_before)
        return images, time.perf_counter() - start, rates

    def _count_step(self, *, completes: bool) -> None:
        state = self._state
        state.step += 1
        state.steps_since_update = 0 if completes else state.steps_since_update + 1
        state.updates += completes

    def _report_step(self, number: int, steps: int, images: int, start: float) -> None:
        if not self._callbacks:
            return
        record = StepRecord(
            epoch=self._state.epoch + 1,
            step=number,
            steps_in_epoch=steps,
            images=images,
            seconds=time.perf_counter() - start,
            loss=self._meter.latest(),
        )
        with self._ledger.span("callbacks"):
            for callback in self._callbacks:
                callback.on_step(record)

    def _save(self, evaluation: EvaluationRecord | None, best: Best | None, *, waits: bool) -> None:
        """Have everything written; `waits` for the files as well, where no step comes any more."""
        state = self._state
        with self._ledger.span("checkpoint_wait"):
            self._keeper.wait()
        with self._ledger.span("checkpoint"):
            state.elapsed_s = self._seconds_since_start()
            is_older = self._apart is not None and 0 < state.awaiting < state.epoch
            awaiting = self._apart.weights() if is_older and self._apart is not None else None
            self._keeper.save(state, evaluation, best=best, awaiting=awaiting)
        if waits:
            with self._ledger.span("checkpoint_wait"):
                self._keeper.wait()

    def _evaluate_average(self) -> EvaluationRecord:
        with self._ledger.span("evaluation"):
            evaluation = self._evaluate(self._engine.parts.assemble(self._ema.network))
        self._judge(self._state.epoch, evaluation)
        return evaluation

    def _evaluate_apart(self) -> None:
        assert self._apart is not None
        with self._ledger.span("evaluation"):
            self._apart.start(self._state.epoch, self._engine.parts.assemble(self._ema.network))
        self._state.awaiting = self._state.epoch

    def _take_in(self, *, waits: bool) -> Best | None:
        """Judge what was evaluated apart, if it is there on the first rank; returns its weights if they are the best.

        All ranks come here at the ends of epochs, and hear the same.
        """
        if self._apart is None or self._apart.epoch == 0:
            return None
        if waits:
            with self._ledger.span("evaluation_wait"):
                self._apart.wait()
        answer = self._engine.parts.first(self._apart.answer())
        if answer is None:
            return None
        epoch = self._apart.epoch
        with self._ledger.span("evaluation_wait"):
            network = self._apart.take()
        self._longest_evaluation_s = max(self._longest_evaluation_s, answer.seconds)
        return self._take_late(epoch, answer.evaluation, answer.seconds, network)

    def _take_late(self, epoch: int, evaluation: EvaluationRecord, seconds: float, network: Module) -> Best | None:
        """Judge and record an evaluation that was not there with its epoch."""
        state = self._state
        state.awaiting = 0
        self._judge(epoch, evaluation)
        record = LateEvaluationRecord(
            epoch=epoch,
            evaluation=evaluation,
            best_ap=state.best_ap,
            elapsed_s=self._seconds_since_start(),
            seconds=seconds,
        )
        self._keeper.record(record)
        is_best = state.best_epoch == epoch
        return Best(epoch=epoch, evaluation=evaluation, tensors=network.state_dict()) if is_best else None

    def _evaluate_what_was_left(self) -> None:
        """Evaluate what a resumed run was about to when it ended: beside the training, if that goes on."""
        state = self._state
        if state.awaiting == 0:
            return
        network = self._engine.parts.assemble(self._ema.network)
        if self._awaited:
            network = copy.deepcopy(network)
            network.load_state_dict(self._awaited)
            self._awaited = None
        if self._apart is not None and state.epoch < state.epochs:
            self._apart.start(state.awaiting, network)
            return
        begin = time.perf_counter()
        with self._ledger.span("evaluation"):
            evaluation = self._evaluate(network)
        best = self._take_late(state.awaiting, evaluation, time.perf_counter() - begin, network)
        self._save(None, best, waits=True)

    def _judge(self, epoch: int, evaluation: EvaluationRecord) -> None:
        """See whether the weights of an epoch are the best, and tell the callbacks."""
        state = self._state
        self._judged = epoch
        if state.best_epoch == 0 or evaluation.ap > state.best_ap:
            state.best_ap, state.best_epoch, self._best = evaluation.ap, epoch, evaluation
        with self._ledger.span("callbacks"):
            for callback in self._callbacks:
                callback.on_evaluation(epoch, evaluation)

    def _seconds_since_start(self) -> float:
        """Read the clock of the first rank: what hangs on it has to be the same on all."""
        return self._engine.parts.first(self._budget.seconds_since_start())

    def _count_skipped(self, skipped: Tensor, updates: int) -> None:
        """Take in how many of an epoch's updates were left out."""
        with self._ledger.span("device_wait"):
            number = int(skipped.item())
        self._lost = self._lost + number if 2 * number >= updates else 0
        if number == 0:
            return
        self._state.skipped_updates += number
        log.warning("Epoch %d: %d updates left out, the gradient was not finite.", self._state.epoch + 1, number)
        if self._lost >= MOST_LOST:
            raise UserError(
                f"The training diverged: of the last gradients {self._lost} were not finite, half or more of each "
                "epoch; choose a smaller lr0, or amp=off."
            )

    def _background(self) -> dict[str, float]:
        """Take the work of the loader's threads during this epoch."""
        sums = self._data.stats()
        since = {name: value - self._background_before.get(name, 0.0) for name, value in sums.items()}
        self._background_before = sums
        return since

    def _patience_is_spent(self) -> bool:
        """Ask once after each evaluation: between two of them, the next one may be better."""
        patience, judged, best_epoch = self._config.patience, self._judged, self._state.best_epoch
        self._judged = 0
        if patience <= 0 or not self._config.val or judged == 0 or judged - best_epoch < patience:
            return False
        log.info("No better AP for %d epochs; the best was epoch %d.", patience, best_epoch)
        return True
