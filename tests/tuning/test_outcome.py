"""The objective, and what a run is worth by it."""

from __future__ import annotations

import pytest

from paceline.errors import UserError
from paceline.tuning.outcome import Objective, evaluations

LINES = [
    {"elapsed_s": 10.0, "evaluation": {"ap": 0.1}},
    {"elapsed_s": 20.0, "evaluation": None},
    {"elapsed_s": 30.0, "evaluation": {"ap": 0.4}},
    {"elapsed_s": 40.0, "evaluation": {"ap": 0.3}},
    {"elapsed_s": 700.0, "evaluation": {"ap": 0.5}},
]


@pytest.mark.parametrize(
    ("text", "value"), [("ap", 0.5), ("AP@600s", 0.4), ("ap@10m", 0.4), ("ap@25", 0.1), ("ap@5s", None), ("ap@1h", 0.5)]
)
def test_the_value_is_the_best_ap_in_time(text: str, value: float | None) -> None:
    assert Objective.parse(text).value(LINES) == value


@pytest.mark.parametrize("text", ["", "loss", "ap@", "ap@0s", "ap@-3s", "ap@600s!", "ap50"])
def test_another_objective_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="objective"):
        Objective.parse(text)


def test_it_reads_back_what_it_writes() -> None:
    for text in ("ap", "ap@600s", "ap@0.5s"):
        assert str(Objective.parse(text)) == text


def test_epochs_without_an_evaluation_are_passed_over() -> None:
    assert evaluations(LINES) == [(10.0, 0.1), (30.0, 0.4), (40.0, 0.3), (700.0, 0.5)]
