"""The time budget."""

from __future__ import annotations

import pytest

from paceline.errors import UserError
from paceline.training.budget import Budget, parse_duration
from paceline.training.state import TrainingState


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("30m", 1800), ("2h", 7200), ("1.5", 5400), ("1h30m", 5400), ("1d", 86400), (" 2 H ", 7200)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["soon", "", "0", "-3m", "5x", "1h30", "m"])
def test_what_is_no_duration_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UserError, match="30m"):
        parse_duration(text)


def test_the_epochs_fill_the_time() -> None:
    budget = Budget(limit_s=100.0)
    assert budget.epochs(TrainingState(epochs=300, epoch=1), spent_s=10.0) == 10
    assert budget.epochs(TrainingState(epochs=10, epoch=4), spent_s=60.0) == 6
    assert budget.epochs(TrainingState(epochs=6, epoch=6), spent_s=99.0) == 6
    assert budget.epochs(TrainingState(epochs=6, epoch=5), spent_s=130.0) == 5


def test_what_is_needed_at_the_end_is_kept_back() -> None:
    budget = Budget(limit_s=100.0)
    assert budget.epochs(TrainingState(epochs=300, epoch=1), spent_s=10.0, reserve_s=25.0) == 7
    assert budget.epochs(TrainingState(epochs=9, epoch=8), spent_s=80.0, reserve_s=25.0) == 8


def test_without_a_limit_the_epochs_stay() -> None:
    assert Budget(limit_s=None).epochs(TrainingState(epochs=7, epoch=3), spent_s=1e9) == 7


def test_earlier_parts_of_a_resumed_run_count() -> None:
    now = [0.0]
    budget = Budget(limit_s=100.0, spent_before_s=30.0, clock=lambda: now[0])
    now[0] = 12.0
    assert budget.seconds_since_start() == 42.0
