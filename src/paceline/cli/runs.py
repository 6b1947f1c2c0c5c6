"""`paceline train`, `val` and `predict`: options from words, progress and results to the console."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from paceline.cli.argv import Words, sort_words
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.help import print_help
from paceline.options import PredictOptions, TrainOptions, ValOptions, settle_resume

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        print_help(TrainOptions)
        return 0
    words.options = settle_resume(words.options)
    with logging_to(ConsoleHandler()):
        options = read_options(TrainOptions, words)

    from paceline.cli.progress import ProgressCallback, ProgressLogHandler
    from paceline.commands.train import train

    with ProgressCallback() as progress, logging_to(ProgressLogHandler(progress)):
        train(options, [progress])
    return 0


def run_val(arguments: Sequence[str]) -> int:
    """Score weights, and print the figures."""
    words = sort_words(ValOptions, arguments)
    if words.help:
        print_help(ValOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(ValOptions, words)

        from paceline.cli.figures import print_figures
        from paceline.commands.val import validate

        print_figures(validate(options).record)
    return 0


def run_predict(arguments: Sequence[str]) -> int:
    """Predict, with one line per image."""
    words = sort_words(PredictOptions, arguments)
    if words.help:
        print_help(PredictOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(PredictOptions, words)

        from paceline.commands.predict import predict

        for result in predict(options):
            print(_line(result))
    return 0


def _line(result: Results) -> str:
    """Say what was found in an image, and how long it took."""
    height, width = result.orig_shape
    return f"{result.path} {width} x {height}: {result}, {sum(result.speed.values()):.0f} ms"
