"""One study on several machines: each value is run once, whoever was out of touch, and whoever noticed it."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import pytest
from optuna.trial import TrialState

from paceline.tuning.config import TuneConfig
from paceline.tuning.outcome import Objective, Outcome
from paceline.tuning.search import Row, Search
from paceline.tuning.slots import Slot
from paceline.tuning.sources import Trials
from paceline.tuning.space import Range, SearchSpace
from paceline.tuning.study import ENDING, OWNER, ROLE, SEEN, STALE_S, Study

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SPACE = SearchSpace(entries={"lr0": Range(low=0.001, high=10.0, log=True)})
DEFAULTS = {"lr0": 0.01}
CONFIG = TuneConfig(pruner="none")


@pytest.fixture(params=["sqlite:///{}/study.db", "journal:{}/study.log"], ids=["sqlite", "journal"])
def storage(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    return str(request.param).format(tmp_path)


def begin(storage: str) -> Study:
    return Study.create(storage, "s", SPACE, CONFIG, identity={}, defaults=DEFAULTS, seed=0)


def join(storage: str, recover: Callable[[int], Outcome | None] = lambda number: None) -> Study:
    return Study.resume(storage, "s", SPACE, CONFIG, identity={}, seed=1, recover=recover)


def lose_touch(study: Study, number: int, seconds: float = STALE_S + 60) -> None:
    """As if the trial ran on another host, which was last seen so long ago."""
    trial = study._running[number]
    trial.set_user_attr(OWNER, {"host": "elsewhere", "pid": 1, "started": 0.0})
    trial.set_user_attr(SEEN, time.time() - seconds)


def copies(study: Study) -> int:
    """Trials with the values of the defaults that wait, run or have ended with a value."""
    return sum(
        trial.user_attrs.get(ROLE) == "defaults" and trial.user_attrs.get(ENDING) != "interrupted"
        for trial in study.trials
    )


def test_a_trial_that_another_machine_has_settled_is_ended_and_left_alone(storage: str) -> None:
    lost = begin(storage)
    number = lost.ask("cores 0").number
    lose_touch(lost, number)
    other = join(storage)
    settled = other.trials[number]
    assert settled.user_attrs[ENDING] == "interrupted"
    lost.seen()
    assert lost.report(number, 5.0, 0.1)
    assert lost.finish(number, Outcome(ending="complete", value=0.3), 9.0).ending == "interrupted"
    assert lost.trials[number] == settled
    assert copies(lost) == 1
    assert lost.ask("cores 0").values == DEFAULTS  # it takes part again


@pytest.mark.parametrize("call", ["seen", "report", "finish"])
def test_each_way_to_notice_is_quiet(storage: str, call: str) -> None:
    lost = begin(storage)
    number = lost.ask("cores 0").number
    lose_touch(lost, number)
    join(storage)
    if call == "seen":
        lost.seen()
    elif call == "report":
        assert lost.report(number, 5.0, 0.1)
    else:
        lost.finish(number, Outcome(ending="interrupted", reason="the end"), 9.0)
    assert not lost._running
    assert copies(lost) == 1


@pytest.mark.parametrize("when", ["before the attributes", "before the state"])
def test_two_machines_that_reclaim_the_same_trial_queue_it_once(
    storage: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = begin(storage)
    number = lost.ask("cores 0").number
    one, two = join(storage), join(storage)
    lose_touch(lost, number)
    if when == "before the state":
        tell = one.optuna.tell

        def late(*args: object, **options: object) -> object:
            two.reclaim(lambda number: None)
            return tell(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(one.optuna, "tell", late)
        one.reclaim(lambda number: None)
    else:
        one.reclaim(lambda number: two.reclaim(lambda number: None))
    assert copies(one) == 1
    assert [trial.state for trial in one.trials] == [TrialState.FAIL, TrialState.WAITING]


def test_what_the_owner_records_in_the_last_moment_holds(storage: str) -> None:
    owner = begin(storage)
    number = owner.ask("cores 0").number
    other = join(storage)
    lose_touch(owner, number)

    def recover(number: int) -> None:
        owner.finish(number, Outcome(ending="complete", value=0.3), 9.0)

    other.reclaim(recover)
    assert [(trial.state, trial.value) for trial in other.trials] == [(TrialState.COMPLETE, 0.3)]
    assert other.num_started() == 1


@pytest.mark.parametrize(("out", "taken"), [(0.0, True), (STALE_S, False)])
def test_who_was_out_of_touch_itself_gives_others_time(storage: str, out: float, taken: bool) -> None:
    """After a storage was down for all, the first that is back must not take over what the others still run."""
    owner = begin(storage)
    number = owner.ask("cores 0").number
    other = join(storage)
    lose_touch(owner, number)
    other._last_seen -= out
    other.seen()
    other.reclaim(lambda number: None)
    assert (other.trials[number].state == TrialState.FAIL) is taken


def test_a_search_goes_on_when_its_trial_was_taken_over(tmp_path: Path, program: Sequence[str]) -> None:
    storage = f"sqlite:///{tmp_path}/study.db"
    study = begin(storage)
    rows: list[Row] = []

    def show(row: Row) -> None:
        rows.append(row)
        if row.key == "00000" and row.epoch == 1 and 0 in study._running:
            lose_touch(study, 0)
            join(storage)

    search = Search(
        slots=[Slot(device="cpu", cores=(min(os.sched_getaffinity(0)),))],
        command=program,
        base={"epochs": 20, "lr0": 0.01, "slow": 5},
        folder=tmp_path,
        objective=Objective(),
        show=show,
    )
    assert search.run(Trials(study, most=2, runs=tmp_path, objective=Objective()))
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    (ended,) = (row for row in rows if row.key == "00000" and row.state != "running")
    assert (ended.state, "another machine" in ended.reason) == ("interrupted", True)
    assert ended.epoch < 20
    assert study.defaults() is not None
