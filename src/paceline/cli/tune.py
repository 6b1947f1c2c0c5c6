"""`paceline tune`: options from words, a table of trials while the search goes on, the answer at its end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.argv import sort_words
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.help import print_help
from paceline.cli.trials import TrialTable
from paceline.options import TuneOptions, read_mapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.commands.tune_answer import TuneResult


def run_tune(arguments: Sequence[str]) -> int:
    """Search."""
    words = sort_words(TuneOptions, arguments)
    if words.help:
        print_help(TuneOptions, brief=words.brief)
        return 0
    from paceline.commands.tune import settle_tune, tune

    with logging_to(ConsoleHandler()):
        given = read_mapping(Path(words.config)) | words.options if words.config else words.options
        options = settle_tune(given)
    with TrialTable() as table, logging_to(ConsoleHandler()):
        result = tune(options, table.show)
    print_answer(result)
    return 0


def print_answer(result: TuneResult) -> None:
    """Print what was found, and how to use it."""
    for line in result.summary:
        print(line)
    print(", ".join(f"{name}={_short(value)}" for name, value in sorted(result.values.items())))
    print(f"Train with it:  paceline train --config {result.best}")
    print(f"All trials:     {result.page}")


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
