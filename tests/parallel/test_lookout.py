"""The lookout: who is blamed, and who is not."""

from __future__ import annotations

import dataclasses

import pytest

from paceline.parallel.config import LimitsConfig
from paceline.parallel.fault import Fault
from paceline.parallel.lookout import LEFT, NEIGHBOURS, WATCH_ALL, Beat, Lookout, watched_ranks

LIMITS = LimitsConfig()
HOSTS = {rank: f"host{rank}" for rank in range(4)}


def beat(count: int, **more: object) -> Beat:
    usual = Beat(count=count, step=7, phase="step", phase_s=0.5, where="loop.py:1 in run", waits=False)
    return dataclasses.replace(usual, **more)  # type: ignore[arg-type]


def lookout(limits: LimitsConfig = LIMITS) -> Lookout:
    return Lookout(limits, HOSTS)


def test_beats_travel_whole() -> None:
    assert Beat.from_json(beat(3).to_json()) == beat(3)
    fault = Fault(rank=1, host="h", step=2, phase="step", what="was killed", details="…", status=130)
    assert Fault.from_json(fault.to_json()) == fault


def test_the_one_that_is_silent_longest_is_named() -> None:
    look = lookout()
    for now in range(30):
        look.hear({0: beat(now), 1: beat(min(now, 10)), 2: beat(min(now, 5))}, float(now))
    assert look.silent(19.0, after_s=15) is None
    fault = look.silent(29.0, after_s=15)
    assert fault is not None
    assert (fault.rank, fault.host, fault.step, fault.phase) == (2, "host2", 7, "step")
    assert "24 s" in fault.what


def test_who_has_left_may_be_silent() -> None:
    look = lookout()
    for now in range(100):
        look.hear({0: beat(now), 1: beat(0, phase=LEFT, phase_s=1e6)}, float(now))
    assert look.silent(99.0, after_s=15) is None
    assert look.overdue(99.0) is None


def test_who_slept_blames_nobody_for_it() -> None:
    look = lookout()
    look.hear({1: beat(1)}, 0.0)
    look.hear({1: beat(1)}, 100.0)
    assert look.silent(100.0, after_s=15) is None
    for now in range(101, 117):
        look.hear({1: beat(1)}, float(now))
    assert look.silent(116.0, after_s=15) is not None


@pytest.mark.parametrize(("phase", "option"), [("step", "limit_step"), ("evaluation", "limit_evaluation")])
def test_a_phase_over_its_limit_names_the_option(phase: str, option: str) -> None:
    limit_s = getattr(LIMITS, option)
    look = lookout()
    look.hear({1: beat(1, phase=phase, phase_s=limit_s - 1)}, 0.0)
    assert look.overdue(0.9) is None
    fault = look.overdue(1.1)
    assert fault is not None
    assert option in fault.what
    assert "loop.py:1 in run" in fault.what


def test_of_ranks_that_are_stuck_together_the_one_that_waits_for_nobody_is_named() -> None:
    look = lookout()
    late = LIMITS.limit_step + 1
    look.hear(
        {
            0: beat(1, phase_s=late + 1, waits=True),
            1: beat(1, phase_s=late, waits=True),
            2: beat(1, phase_s=late - 2),
            3: beat(1, phase_s=late, waits=True, step=6),
        },
        0.0,
    )
    fault = look.overdue(0.0)
    assert fault is not None
    assert fault.rank == 2


def test_no_limit_is_no_limit() -> None:
    look = lookout(LimitsConfig(limit_step=0))
    look.hear({1: beat(1, phase_s=1e9)}, 0.0)
    assert look.overdue(0.0) is None


@pytest.mark.parametrize("world", [1, 2, WATCH_ALL, WATCH_ALL + 1, 1000])
def test_everybody_is_watched_by_several(world: int) -> None:
    watchers = dict.fromkeys(range(world), 0)
    for rank in range(world):
        watched = watched_ranks(rank, world)
        assert rank not in watched
        assert len(watched) <= max(WATCH_ALL, NEIGHBOURS) or rank == 0
        for other in watched:
            watchers[other] += 1
    assert all(count >= min(world - 1, NEIGHBOURS) for count in watchers.values())


def test_every_phase_has_a_limit() -> None:
    names = {field.name for field in dataclasses.fields(LimitsConfig)}
    for phase in ("start", "index", "compile", "step", "evaluation", "checkpoint", "end"):
        assert LIMITS.option(phase) in names
        assert LIMITS.of(phase) > 0
