"""The training loop, as it reads aloud: wait for a batch, forward and backward, update, count, record."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

from paceline.records import EndRecord, EpochRecord, StepRecord
from paceline.training.divergence import Divergence
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
    from paceline.records import EvaluationRecord, LateEvaluationRecord
    from paceline.training.budget import Budget
    from paceline.training.config import LoopConfig
    from paceline.training.ema import Ema
    from paceline.training.judge import Judge
    from paceline.training.schedule import Rates, Schedule
    from paceline.training.state import TrainingState
    from paceline.training.step import Step

log = logging.getLogger("paceline")


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
        judge: Judge,
        keeper: Keeper,
        state: TrainingState,
        budget: Budget,
        elapsed: Callable[[], float],
        ledger: Ledger,
        config: LoopConfig,
        close_mosaic: int,
        device: torch.device,
        callbacks: Sequence[Callback],
        frozen: Sequence[Module] = (),
        stops: Callable[[int], bool] = lambda step: False,
        awaited: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Take what the run is made of.

        elapsed: seconds of training so far, the same on all ranks: on one clock's time hangs what all have to do.
        stops: whether all ranks are to stop after a step.
        awaited: of a resumed run, the weights that `state.awaiting` is about, where they are older than the average.
        """
        self._engine = engine
        self._step = step
        self._schedule = schedule
        self._ema = ema
        self._data = data
        self._judge = judge
        self._keeper = keeper
        self._state = state
        self._budget = budget
        self._elapsed = elapsed
        self._ledger = ledger
        self._config = config
        self._close_mosaic = close_mosaic
        self._device = device
        self._callbacks = callbacks
        self._meter = LossMeter(device)
        self._frozen = frozen
        self._stops = stops
        self._awaited = awaited
        self._divergence = Divergence()
        self._background_before: dict[str, float] = {}

    def run(self) -> EndRecord:
        """Train until the epochs, the patience or the time budget are spent, or the run is asked to stop.

        When it returns or raises, checkpoints are written and no thread of it is left.
        """
        try:
            reason = self._run_epochs()
            self._keeper.wait()
        finally:
            self._judge.close()
            self._keeper.close()
        return EndRecord(
            folder=self._keeper.folder,
            reason=reason,
            epochs=self._state.epoch,
            best_epoch=self._state.best_epoch,
            best=self._judge.best,
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
        state, judge = self._state, self._judge
        images, train_s, rates = self._train()
        state.epoch += 1
        with self._ledger.span("device_wait"):
            loss = self._meter.close()
        self._engine.parts.settle(self._engine.network, self._ema.network)
        is_due = judge.is_due()
        best = judge.take_in(waits=is_due)
        evaluation = judge.now() if is_due and judge.waits else None
        state.epochs = self._budget.epochs(state, spent_s=self._elapsed(), reserve_s=judge.longest_s)
        stops = judge.patience_is_spent()
        if stops or state.epoch >= state.epochs:
            best = judge.take_in(waits=True) or best
            if evaluation is None and (is_due or state.epoch >= state.epochs):
                evaluation = judge.now()
        elif is_due and not judge.waits:
            judge.beside()
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
            state.elapsed_s = self._elapsed()
            self._keeper.save(state, evaluation, best=best, awaiting=self._judge.awaiting())
        if waits:
            with self._ledger.span("checkpoint_wait"):
                self._keeper.wait()

    def _evaluate_what_was_left(self) -> None:
        """Evaluate what a resumed run was about to when it ended."""
        weights, self._awaited = self._awaited or {}, None
        if self._state.awaiting == 0 or self._judge.begins_again(weights):
            return
        self._save(None, self._judge.make_up(weights), waits=True)

    def _count_skipped(self, skipped: Tensor, updates: int) -> None:
        """Take in how many of an epoch's updates were left out."""
        with self._ledger.span("device_wait"):
            number = int(skipped.item())
        if number:
            self._state.skipped_updates += number
            log.warning("Epoch %d: %d updates left out, the gradient was not finite.", self._state.epoch + 1, number)
        self._divergence.count(number, updates)

    def _background(self) -> dict[str, float]:
        """Take the work of the loader's threads during this epoch."""
        sums = self._data.stats()
        since = {name: value - self._background_before.get(name, 0.0) for name, value in sums.items()}
        self._background_before = sums
        return since
