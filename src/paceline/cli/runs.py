"""`paceline train`, `val` and `predict`: options from words, progress and results to the console."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paceline.cli.argv import Words, sort_words
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.help import print_help
from paceline.data.config import DataConfig
from paceline.options import PredictOptions, TrainOptions, ValOptions, settle_resume

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from paceline.callbacks import Callback
    from paceline.commands.train import TrainResult
    from paceline.options import Options
    from paceline.results import Results

OptionsT = TypeVar("OptionsT", bound="Options")
log = logging.getLogger("paceline")


def read_options(command: type[OptionsT], words: Words) -> OptionsT:
    """Build a command's options from its words and, if one is named, its file."""
    if words.config:
        return command.read(Path(words.config), words.options)
    return command.from_flat(words.options)


def run_train(arguments: Sequence[str]) -> int:
    """Train."""
    words = sort_words(TrainOptions, arguments)
    if words.help:
        print_help(TrainOptions, brief=words.brief)
        return 0
    words.options = settle_resume(words.options)
    with logging_to(ConsoleHandler()):
        options = read_options(TrainOptions, words)
        if not words.config:
            warn_of_embedded_data(words.options)
    train_with_progress(options)
    return 0


def warn_of_embedded_data(given: Mapping[str, object]) -> None:
    """Warn who named no data set for a new run that it trains on the one that comes with the package."""
    if not given.get("data") and not given.get("resume"):
        log.warning(
            "No data set is named, so this trains on the embedded one (%s); write data=path/to/data.yaml for your own.",
            DataConfig().data,
        )


def train_with_progress(
    options: TrainOptions, callbacks: Sequence[Callback] = (), transform: Callable[..., Any] | None = None
) -> TrainResult:
    """Train in this process, or in as many as the options ask for, with progress on this terminal.

    Callbacks and the transform travel to the processes by value; callbacks are called in rank 0, and have what they
    remember when they come back, but for what cannot travel.
    """
    from paceline.commands.layout import ranks_to_launch

    with logging_to(ConsoleHandler()):
        num_ranks = ranks_to_launch(options)
    if num_ranks == 1:
        return _train_here(options, callbacks, transform)
    from paceline.parallel.launch import launch

    result, states = launch(num_ranks, _train_as_rank, options, list(callbacks), transform)
    for callback, state in zip(callbacks, states, strict=True):
        if hasattr(callback, "__dict__"):
            vars(callback).update(state)
    return result


def _train_as_rank(
    options: TrainOptions, callbacks: list[Callback], transform: Callable[..., Any] | None
) -> tuple[TrainResult, list[dict[str, Any]]]:
    from paceline.parallel.launch import portable

    result = _train_here(options, callbacks, transform)
    return result, [portable(getattr(callback, "__dict__", {})) for callback in callbacks]


def _train_here(
    options: TrainOptions, callbacks: Sequence[Callback], transform: Callable[..., Any] | None
) -> TrainResult:
    """Train in this process; in a rank other than 0 only warnings are shown, behind the rank's number."""
    from paceline.cli.progress import ProgressCallback, ProgressLogHandler
    from paceline.commands.train import train
    from paceline.parallel.rank import rank_of_environment

    rank = rank_of_environment()
    if rank is not None and not rank.is_main:
        with logging_to(ConsoleHandler(logging.WARNING), prefix=f"[rank {rank.rank}] "):
            return train(options, callbacks, transform)
    with ProgressCallback() as progress, logging_to(ProgressLogHandler(progress)):
        return train(options, [progress, *callbacks], transform)


def run_val(arguments: Sequence[str]) -> int:
    """Score weights, and print the figures."""
    words = sort_words(ValOptions, arguments)
    if words.help:
        print_help(ValOptions, brief=words.brief)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(ValOptions, words)

        from paceline.cli.figures import print_figures
        from paceline.commands.val import validate

        print_figures(validate(options).record, with_classes=options.validation.verbose)
    return 0


def run_predict(arguments: Sequence[str]) -> int:
    """Predict, with one line per image."""
    words = sort_words(PredictOptions, arguments)
    if words.help:
        print_help(PredictOptions, brief=words.brief)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(PredictOptions, words)

        from paceline.commands.predict import predict

        for result in predict(options):
            if options.prediction.verbose:
                print(_line(result))
    return 0


def _line(result: Results) -> str:
    """Say what was found in an image, and how long it took."""
    height, width = result.orig_shape
    return f"{result.path} {width} x {height}: {result}, {sum(result.speed.values()):.0f} ms"
