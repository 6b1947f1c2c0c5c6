"""`paceline bench`: options from words, the measuring in as many processes as are asked for, tables at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.argv import sort_words
from paceline.cli.bench_tables import print_bench, print_comparison
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.help import print_help
from paceline.cli.runs import read_options
from paceline.options import BenchOptions
from paceline.parallel.rank import rank_of_environment
from paceline.planning.comparison import compare
from paceline.planning.record import BenchRecord

if TYPE_CHECKING:
    from collections.abc import Sequence


def run_bench(arguments: Sequence[str]) -> int:
    """Measure, write and print."""
    words = sort_words(BenchOptions, arguments)
    if words.help:
        print_help(BenchOptions, brief=words.brief)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(BenchOptions, words)
    bench_and_print(options)
    return 0


def bench_and_print(options: BenchOptions) -> BenchRecord:
    """Measure in this process or in several, write the figures, and print them beside those of an earlier bench.

    In a process that was started as one of several, only the first of them writes and prints.
    """
    from paceline.commands.bench import ranks_to_launch

    config = options.bench
    with logging_to(ConsoleHandler()):
        old = BenchRecord.read(Path(config.compare)) if config.compare else None  # before anything takes its time
        num_ranks = ranks_to_launch(options)
    if num_ranks == 1:
        record = _bench_here(options)
    else:
        from paceline.parallel.launch import launch

        record = launch(num_ranks, _bench_here, options)
    rank = rank_of_environment()
    if rank is None or rank.is_main:
        print_bench(record)
        if old is not None:
            print_comparison(compare(old, record), config.compare)
        if config.json:
            record.write(Path(config.json))
    return record


def _bench_here(options: BenchOptions) -> BenchRecord:
    """Take this process's part; a rank other than 0 shows warnings alone, behind its number."""
    from paceline.commands.bench import bench

    rank = rank_of_environment()
    if rank is not None and not rank.is_main:
        with logging_to(ConsoleHandler(logging.WARNING), prefix=f"[rank {rank.rank}] "):
            return bench(options)
    with logging_to(ConsoleHandler()):
        return bench(options)
