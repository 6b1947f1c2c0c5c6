"""Progress: what a run says on the terminal while it goes on, and as plain lines where there is no terminal."""

from __future__ import annotations

import logging
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from paceline.callbacks import Callback
from paceline.cli.wording import duration, figure, plural, rate

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.records import (
        ClassRecord,
        EndRecord,
        EpochRecord,
        EvaluationRecord,
        LossRecord,
        RunRecord,
        StepRecord,
    )

_REDRAW_S = 0.125
_REDRAW_SHARE = 0.002
_LINE_S = 30.0
_MOST_CLASSES = 40
_HEADER_EVERY = 25
_BAR_WIDTH = 24
_WIDE = 96
"""Columns from which on a row counts images and boxes, too; below the next two it leaves out rates, then losses."""
_FULL = 79
_SLIM = 60
_LONGEST_NAME = 32
_FIGURES_WIDTH = 51
"""Columns of the last table beside the names of classes."""


@dataclass(kw_only=True)
class _Pace:
    """Where the run stands, and how long the rest will take."""

    epochs: int
    epoch: int = 0
    step: int = 0
    steps: int = 0
    images: int = 0
    start: float = 0.0
    recent_s: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    """Wall times of the last epochs, evaluation included."""

    def count(self, record: StepRecord, now: float) -> None:
        if record.epoch != self.epoch or record.step <= self.step:
            self.epoch, self.images, self.start = record.epoch, 0, now - record.seconds
        self.step, self.steps = record.step, record.steps_in_epoch
        self.images += record.images

    def images_per_s(self, now: float) -> float:
        return self.images / max(now - self.start, 1e-9)

    def epoch_left_s(self, now: float) -> float:
        return (now - self.start) / max(self.step, 1) * (self.steps - self.step)

    def run_left_s(self, now: float) -> float:
        """Rest of the training steps, what follows them in an epoch, and the epochs still to come."""
        training_s = (now - self.start) / max(self.step, 1) * self.steps
        epoch_s = max(self._mean_epoch_s(), training_s)
        return self.epoch_left_s(now) + epoch_s - training_s + (self.epochs - self.epoch) * epoch_s

    def run_left_after_epoch_s(self) -> float:
        return self._mean_epoch_s() * (self.epochs - self.epoch)

    def _mean_epoch_s(self) -> float:
        return sum(self.recent_s) / len(self.recent_s) if self.recent_s else 0.0


class ProgressCallback(Callback):
    """Show a run: a bar on a terminal, else one line per epoch and one every 30 s within long epochs.

    `on_step` costs a few microseconds; the bar is drawn at most 8 times a second, and less often where drawing is so
    slow (a far terminal) that it would take more than 0.2 % of the time. Use it as a context manager, or call
    `close`, so that an exception leaves the terminal whole.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(highlight=False) if console is None else console
        self._clock = clock
        terminal = self._console.is_terminal and not self._console.is_dumb_terminal and not self._console.is_jupyter
        self._live: Live | None = None
        self._is_live = terminal
        self._pace = _Pace(epochs=0)
        self._loss: LossRecord | None = None
        self._doing = "starting"
        self._best_ap: float | None = None
        self._evaluated: dict[int, EvaluationRecord] = {}
        self._rows = 0
        self._redraw_at = 0.0
        self._line_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar away and give the cursor back; nothing happens the second time."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def message(self, text: str) -> None:
        """Print a line above the bar."""
        self._print(Text(text))

    def on_start(self, record: RunRecord) -> None:
        """Say what is trained, on what, and where it is written."""
        self._pace = _Pace(epochs=record.epochs)
        classes = plural(len(record.class_names), "class", "classes")
        self._print(Text(f"{record.model} on {record.data}", style="bold"))
        self._print(
            Text(
                f"{classes}, {record.num_train_images:,} training and {record.num_val_images:,} validation images, "
                f"{record.num_parameters:,} parameters"
            )
        )
        self._print(
            Text(f"{plural(record.epochs, 'epoch')} on {record.device}, {record.precision}, {record.optimizer}")
        )
        self._print(Text(f"writing to {record.folder}\n"))
        self._line_at = self._clock() + _LINE_S
        if self._is_live:
            self._live = Live(Text(""), console=self._console, auto_refresh=False, transient=True)
            self._live.start()
            self._redraw()

    def on_step(self, record: StepRecord) -> None:
        """Count the step; draw only when it is time to."""
        now = self._clock()
        self._pace.count(record, now)
        if record.loss is not None:
            self._loss = record.loss
        is_last = record.step >= record.steps_in_epoch
        if self._live is not None:
            self._doing = "evaluating" if is_last else ""
            if now >= self._redraw_at or is_last:
                self._redraw()
        elif now >= self._line_at and not is_last:
            self._line_at = now + _LINE_S
            self._print(Text(self._step_line(now)))

    def on_evaluation(self, epoch: int, record: EvaluationRecord) -> None:
        """Say that the epoch is being finished; its figures are shown with the next record of an epoch."""
        self._evaluated[epoch] = record
        if self._live is not None:
            self._doing = "saving"
            self._redraw()

    def on_epoch(self, record: EpochRecord) -> None:
        """Print the epoch's results: a row of the table, or a line."""
        self._pace.epochs, self._pace.epoch = record.epochs, record.epoch
        self._pace.recent_s.append(record.wall_s)
        self._evaluated.pop(record.epoch, None)
        self._show_late(-1.0 if record.evaluation is not None else record.best_ap)
        evaluation = record.evaluation
        is_best = evaluation is not None and evaluation.ap >= record.best_ap
        is_best = is_best and (self._best_ap is None or record.best_ap > self._best_ap) and _is_shown(record.best_ap)
        if evaluation is not None:
            self._best_ap = record.best_ap
        if self._is_live:
            self._print_row(record, is_best=is_best)
        else:
            self._print(Text(self._epoch_line(record, is_best=is_best)))
        self._line_at = self._clock() + _LINE_S
        if self._live is not None:
            self._doing = "drawing pictures" if record.epoch >= record.epochs else "starting"
            self._pace.step = 0
            self._redraw()

    def on_end(self, record: EndRecord) -> None:
        """Print how the run ended, the best figures per class, and where to look."""
        self._show_late(-1.0)
        self.close()
        best = f", the best was epoch {record.best_epoch}" if record.best_epoch else ""
        if record.best is not None and not _is_shown(record.best.ap):
            best = f", no epoch has an AP above {figure(0.0)} yet"
        ended = f"{record.reason}: {plural(record.epochs, 'epoch')} in {duration(record.wall_s)}{best}"
        self._print(Text(f"\n{ended}", style="bold"))
        if record.best is not None:
            self._print(Text())
            self._print_results(record.best)
        self._print(Text())
        folder = record.folder
        places = [("folder", folder)]
        if record.epochs:
            best_or_last = "best.safetensors" if record.best_epoch else "last.safetensors"
            places.append(("weights", folder / "weights" / best_or_last))
        if (folder / "pictures").is_dir():
            places.append(("pictures", folder / "pictures"))
        for name, path in places:
            self._print(Text.assemble((f"{name:<10}", "bright_black"), str(path)))
        if not record.epochs:
            self._print(Text("no epoch was finished, so nothing is kept to go on from; start the run again"))
        elif record.reason == "preempted":
            self._print(Text.assemble((f"{'go on':<10}", "bright_black"), f"paceline train --resume {folder}"))

    def _show_late(self, best_ap: float) -> None:
        """Print the figures of earlier epochs that were evaluated beside the training; the best has `best_ap`."""
        for epoch, evaluation in sorted(self._evaluated.items()):
            is_best = evaluation.ap >= best_ap and (self._best_ap is None or evaluation.ap > self._best_ap)
            if is_best:
                self._best_ap = evaluation.ap
            is_best = is_best and _is_shown(evaluation.ap)
            if self._is_live:
                self._print_figures(epoch, evaluation, is_best=is_best)
            else:
                self._print(Text(f"epoch {epoch} evaluated: {_figures(evaluation)}" + (" (best)" if is_best else "")))
        self._evaluated.clear()

    def _redraw(self) -> None:
        """Draw the bar, and do not draw again before this drawing's cost is 0.2 % of the time."""
        assert self._live is not None
        before = self._clock()
        self._live.update(self._bar(before), refresh=True)
        cost_s = self._clock() - before
        self._redraw_at = before + max(_REDRAW_S, cost_s / _REDRAW_SHARE)

    def _bar(self, now: float) -> Text:
        """Lay out one line; on narrow terminals the end is cut off, so the less important comes last."""
        pace = self._pace
        epoch = min(pace.epoch + (pace.step == 0), pace.epochs)
        if self._doing == "drawing pictures":
            return Text(f"{self._place(epoch)}  drawing pictures", style="bright_black")
        done = round(_BAR_WIDTH * pace.step / max(pace.steps, 1))
        line = "-" if self._console.options.ascii_only else "━"
        text = Text(f"{self._place(epoch)}  ", no_wrap=True, overflow="ellipsis")
        if self._console.options.ascii_only:
            text.overflow = "crop"  # for the dots of an ellipsis are one letter
        text.append(line * done, style="blue").append(line * (_BAR_WIDTH - done), style="bright_black")
        text.append(f"  {pace.step}/{pace.steps}" if pace.steps else "", style="bright_black")
        if self._doing:
            text.append(f"  {self._doing}", style="bright_black")
        if pace.step:
            left = duration(pace.run_left_s(now))
            if not self._doing:
                text.append(f"  {duration(pace.epoch_left_s(now))} left, run {left}")
                text.append(f"  {rate(pace.images_per_s(now))} images/s", style="bright_black")
        if self._loss is not None and pace.step:
            loss = self._loss
            text.append(f"  box {loss.box:.3f}  cls {loss.cls:.3f}  dfl {loss.dfl:.3f}", style="bright_black")
        return text

    def _place(self, epoch: int) -> str:
        return f"{f'{epoch}/{self._pace.epochs}':>8}"

    def _step_line(self, now: float) -> str:
        pace = self._pace
        words = [f"epoch {pace.epoch}/{pace.epochs}, step {pace.step}/{pace.steps}: {_losses(self._loss)}"]
        words.append(f"{rate(pace.images_per_s(now))} images/s")
        words.append(f"epoch left {duration(pace.epoch_left_s(now))}, run left {duration(pace.run_left_s(now))}")
        return "; ".join(words)

    def _epoch_line(self, record: EpochRecord, *, is_best: bool) -> str:
        words = [f"epoch {record.epoch}/{record.epochs}: {_losses(record.loss)}"]
        words.append(f"{rate(record.train_images_per_s)} images/s")
        if record.evaluation is not None:
            words.append(_figures(record.evaluation) + (" (best)" if is_best else ""))
        left = self._pace.run_left_after_epoch_s()
        words.append(duration(record.wall_s) + (f", run left {duration(left)}" if left else ""))
        return "; ".join(words)

    def _print_row(self, record: EpochRecord, *, is_best: bool) -> None:
        """Print one row of the running table, its header again after every 25 rows."""
        width = self._console.width
        if self._rows % _HEADER_EVERY == 0:
            losses = f"{'box':>7}{'cls':>7}{'dfl':>7}" if width >= _SLIM else ""
            counts = f"{'images':>8}{'boxes':>8}" if width >= _WIDE else ""
            rates = f"{'images/s':>10}{'time':>9}" if width >= _FULL else ""
            header = f"{'epoch':>8}{losses}{counts}{'P':>7}{'R':>7}{'AP50':>7}{'AP':>7}  {rates}"
            self._print(Text(header, style="bright_black"))
        self._rows += 1
        row = Text(self._place(record.epoch))
        if width >= _SLIM:
            row.append("".join(f"{part:>7.3f}" for part in (record.loss.box, record.loss.cls, record.loss.dfl)))
        self._append_figures(row, record.evaluation, is_best=is_best)
        if width >= _FULL:
            row.append(f"{rate(record.train_images_per_s):>10}{duration(record.wall_s):>9}", style="bright_black")
        self._print(row)

    def _print_figures(self, epoch: int, evaluation: EvaluationRecord, *, is_best: bool) -> None:
        """Print the figures of an epoch whose own row is further up."""
        row = Text(self._place(epoch))
        row.append(f"{'evaluated':>21}" if self._console.width >= _SLIM else "", style="bright_black")
        self._append_figures(row, evaluation, is_best=is_best)
        self._print(row)

    def _append_figures(self, row: Text, e: EvaluationRecord | None, *, is_best: bool) -> None:
        if self._console.width >= _WIDE:
            row.append(f"{e.num_images:>8,}{e.num_boxes:>8,}" if e is not None else " " * 16)
        results = (e.precision, e.recall, e.ap50, e.ap) if e is not None else ()
        row.append("".join(f"{figure(value):>7}" for value in results) or " " * 28, style="bold" if is_best else "")
        star = "*" if self._console.options.ascii_only else "★"
        row.append(f" {star if is_best else ' '}", style="yellow")

    def _print_results(self, best: EvaluationRecord) -> None:
        """Print the figures over all classes and, up to 40, of each."""
        classes = best.per_class if 1 < len(best.per_class) <= _MOST_CLASSES else ()
        room = self._console.width - _FIGURES_WIDTH if self._is_live else _LONGEST_NAME
        width = min(
            max([len("class"), *(len(entry.name) for entry in classes)]), max(room, len("class")), _LONGEST_NAME
        )
        columns = f"{'images':>9}{'boxes':>9}{'P':>8}{'R':>8}{'AP50':>8}{'AP':>8}"
        self._print(Text(f"{'class':<{width}}{columns}", style="bright_black"))
        self._print(Text(_result_row("all", best, width), style="bold"))
        for entry in classes:
            self._print(Text(_result_row(entry.name, entry, width)))

    def _print(self, text: Text) -> None:
        """Print one line, never wrapped or read as markup; letters that the terminal lacks become `?`."""
        if self._console.options.ascii_only:
            text.plain = text.plain.encode("ascii", "replace").decode("ascii")
        self._console.print(text, soft_wrap=True, highlight=False)


class ProgressLogHandler(logging.Handler):
    """Put log records above the bar."""

    def __init__(self, progress: ProgressCallback, level: int = logging.INFO) -> None:
        super().__init__(level)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's message."""
        self._progress.message(self.format(record))


def _is_shown(ap: float) -> bool:
    """Say whether a figure is more than nothing as it is written; else no epoch is the best."""
    return figure(ap) not in {figure(0.0), figure(-1.0)}


def _losses(loss: LossRecord | None) -> str:
    if loss is None:
        return "losses not read yet"
    return f"box {loss.box:.3f}, cls {loss.cls:.3f}, dfl {loss.dfl:.3f}"


def _figures(e: EvaluationRecord) -> str:
    return f"P {figure(e.precision)}, R {figure(e.recall)}, AP50 {figure(e.ap50)}, AP {figure(e.ap)}"


def _result_row(name: str, record: EvaluationRecord | ClassRecord, width: int) -> str:
    name = name if len(name) <= width else name[: width - 1] + "…"
    values = (record.precision, record.recall, record.ap50, record.ap)
    return f"{name:<{width}}{record.num_images:>9,}{record.num_boxes:>9,}" + "".join(
        f"{figure(value):>8}" for value in values
    )
