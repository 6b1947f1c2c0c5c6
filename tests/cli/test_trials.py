"""The table of trials: plain lines without a terminal, a table with one."""

from __future__ import annotations

import io

from rich.console import Console

from paceline.cli.trials import TrialTable
from paceline.tuning.search import Row


def row(key: str, state: str, ap: float | None = None, reason: str = "") -> Row:
    return Row(key=key, state=state, device="cores 0", epoch=2, epochs=4, ap=ap, seconds=61.0, reason=reason)  # type: ignore[arg-type]


def test_without_a_terminal_each_ended_trial_is_one_line_and_running_ones_are_none() -> None:
    stream = io.StringIO()
    with TrialTable(Console(file=stream)) as table:
        table.show(row("00000", "running"))
        table.show(row("00000", "complete", 0.25))
        table.show(row("00001", "failed", None, "it ran out of memory"))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "trial 00000 complete, AP 0.2500, epoch 2 of 4, 1:01, cores 0",
        "trial 00001 failed, epoch 2 of 4, 1:01, cores 0 (it ran out of memory)",
    ]


def test_reasons_are_shown_as_they_are() -> None:
    """Also where they look like markup, as torch's sentence about memory does."""
    reasons = ("RuntimeError: [enforce fail at alloc_cpu.cpp:117] no memory", "cannot read [/data/x]")
    stream = io.StringIO()
    with TrialTable(Console(file=stream, force_terminal=True, width=200)) as table:
        for number, reason in enumerate(reasons):
            table.show(row(f"{number:05d}", "failed", None, reason))
        shown = io.StringIO()
        Console(file=shown, width=200).print(table.table())
    assert all(reason in shown.getvalue() for reason in reasons)


def test_on_a_terminal_the_best_and_the_running_ones_are_always_shown() -> None:
    stream = io.StringIO()
    with TrialTable(Console(file=stream, force_terminal=True, width=120)) as table:
        table.show(row("00000", "complete", 0.9))
        for number in range(1, 60):
            table.show(row(f"{number:05d}", "complete", 0.1))
        table.show(row("00060", "running", 0.05))
        shown = io.StringIO()
        Console(file=shown, width=120).print(table.table())
    text = shown.getvalue()
    assert "00000 *" in text
    assert "00060" in text
    assert "00059" in text
    assert "00010" not in text
    assert text.splitlines()[0].strip() == "61 trials"
