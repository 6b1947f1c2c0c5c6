"""Rounds: taking turns, leaving out early, budget, ties."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest

from paceline.training.rounds import TIE, best_of, time_in_rounds


@dataclass
class Fake:
    """Candidates are names; each run lasts as its next entry says, the last one for ever."""

    durations: dict[str, list[float]]
    now: float = 0.0
    ran: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def seconds(self, candidate: str) -> float:
        assert candidate not in self.left, "a candidate that was left is never run again"
        self.ran.append(candidate)
        times = self.durations[candidate]
        value = times.pop(0) if len(times) > 1 else times[0]
        self.now += 0.0 if math.isinf(value) else value
        return value

    def leave(self, candidate: str) -> None:
        self.left.append(candidate)

    def clock(self) -> float:
        return self.now


def timed(fake: Fake, budget_s: float = 1e9, rounds: int = 5) -> list[tuple[str, float, int]]:
    entries = time_in_rounds(list(fake.durations), fake, budget_s=budget_s, most_rounds=rounds, clock=fake.clock)
    return [(entry.candidate, entry.seconds, entry.rounds) for entry in entries]


def test_the_least_time_after_the_warm_up_counts_and_the_fastest_comes_first() -> None:
    fake = Fake({"a": [2.5, 2.0, 2.3, 2.3], "b": [0.9, 1.9, 1.8, 2.1, 2.0, 2.0]})
    assert timed(fake) == [("b", 1.8, 2), ("a", 2.0, 2)], "after two rounds one is left"


def test_candidates_take_turns() -> None:
    fake = Fake({"a": [1.0], "b": [1.0], "c": [1.0]})
    timed(fake, rounds=2)
    assert fake.ran == ["a", "b", "c"] * 3


@pytest.mark.parametrize(("seconds", "rounds"), [(4.0, 0), (1.3, 1), (1.12, 2), (1.06, 3), (1.04, 5)])
def test_who_is_behind_is_left_out_the_earlier_the_farther(seconds: float, rounds: int) -> None:
    fake = Fake({"best": [1.0], "other": [seconds]})
    assert timed(fake)[1] == ("other", seconds, rounds)
    assert sorted(fake.left) == ["best", "other"], "all are freed in the end, each once"


def test_of_equals_the_first_is_taken() -> None:
    assert timed(Fake({"first": [1.0 + TIE / 2], "second": [1.0]}))[0][0] == "first"
    assert timed(Fake({"first": [1.0 + 2 * TIE], "second": [1.0]}))[0][0] == "second"


def test_what_is_not_possible_is_last_and_never_tried_again() -> None:
    fake = Fake({"broken": [math.inf], "works": [1.0]})
    assert timed(fake)[0][0] == "works"
    assert fake.ran.count("broken") == 1


def test_nothing_is_possible() -> None:
    assert timed(Fake({"a": [math.inf], "b": [math.inf]})) == [("a", math.inf, 0), ("b", math.inf, 0)]


def test_the_budget_ends_rounds_and_warm_ups() -> None:
    fake = Fake({"a": [1.0], "b": [1.0], "c": [1.0]})
    assert len(timed(fake, budget_s=1.5)) == 2, "the third one is not begun after 2 s"
    assert fake.now == 2.0
    fake = Fake({"a": [1.0], "b": [1.0]})
    timed(fake, budget_s=3.5)
    assert fake.now == 4.0, "one round beside the warm-up, and no second one"


def test_a_lone_candidate_is_timed_once() -> None:
    assert timed(Fake({"only": [2.0, 1.0]})) == [("only", 1.0, 1)]


def test_a_candidate_that_fell_out_early_never_wins_by_a_lucky_start() -> None:
    fake = Fake({"lucky": [1.0, 1.2], "steady": [1.0, 0.9]})
    entries = time_in_rounds(list(fake.durations), fake, budget_s=1e9, clock=fake.clock)
    assert best_of(entries).candidate == "steady"
