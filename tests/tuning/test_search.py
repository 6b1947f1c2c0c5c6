"""The search with a trial program that needs no torch: endings, kills, locks, resuming, confirmation."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from optuna.trial import TrialState

from paceline.errors import UserError
from paceline.tuning.config import TuneConfig
from paceline.tuning.outcome import Objective, Outcome
from paceline.tuning.search import Row, Search
from paceline.tuning.slots import Slot
from paceline.tuning.sources import Confirmation, Finalist, Trials, folder_of
from paceline.tuning.space import Range, SearchSpace
from paceline.tuning.study import ENDING, REASON, ROLE, Study

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SPACE = SearchSpace(entries={"lr0": Range(low=0.001, high=10.0, log=True)})
DEFAULTS = {"lr0": 0.01}
IDENTITY = {"data set": "some", "model": "yolo11n"}
CORE = min(os.sched_getaffinity(0))
SLOTS = [Slot(device="cpu", cores=(CORE,)), Slot(device="0", cores=(CORE,))]


def storage(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def create(folder: Path, **config: Any) -> Study:
    settings = TuneConfig(**({"pruner": "none"} | config))
    return Study.create(storage(folder), "s", SPACE, settings, identity=IDENTITY, defaults=DEFAULTS, seed=0)


def resume(folder: Path, **config: Any) -> Study:
    settings = TuneConfig(**({"pruner": "none"} | config))
    recover = Trials.recoverer(folder, Objective())
    return Study.resume(storage(folder), "s", SPACE, settings, identity=IDENTITY, seed=1, recover=recover)


def search(folder: Path, program: Sequence[str], rows: list[Row] | None = None, **options: Any) -> Search:
    shown: list[Row] = [] if rows is None else rows
    base: Mapping[str, Any] = {"epochs": 2, "lr0": 0.01} | options
    return Search(
        slots=SLOTS, command=program, base=base, folder=folder, objective=Objective(), show=shown.append
    )  # fmt: skip


def trials_of(study: Study, folder: Path, most: int) -> Trials:
    return Trials(study, most=most, runs=folder, objective=Objective())


def test_all_trials_run_once_and_the_first_is_the_defaults(tmp_path: Path, program: Sequence[str]) -> None:
    study, rows = create(tmp_path), []  # type: ignore[var-annotated]
    assert search(tmp_path, program, rows).run(trials_of(study, tmp_path, 7))
    assert [trial.number for trial in study.trials] == list(range(7))
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)
    first = study.trials[0]
    assert first.params == DEFAULTS
    assert first.user_attrs[ROLE] == "defaults"
    assert study.defaults() is not None
    assert {row.key for row in rows} == {folder_of(number) for number in range(7)}
    for trial in study.trials:
        assert trial.value == pytest.approx(max(0.0, 0.8 - abs(trial.params["lr0"] - 0.3)))
    assert (study.best(1)[0].value or 0) >= (first.value or 0)
    assert len({row.device for row in rows}) == 2


def test_a_trial_that_dies_is_recorded_and_the_search_goes_on(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path, sampler="random")
    assert search(tmp_path, program, how="killed").run(trials_of(study, tmp_path, 10))
    died = [trial for trial in study.trials if trial.params["lr0"] > 1]
    lived = [trial for trial in study.trials if trial.params["lr0"] <= 1]
    assert died
    assert lived
    assert all(trial.state == TrialState.FAIL and "signal 9" in trial.user_attrs[REASON] for trial in died)
    assert all(trial.state == TrialState.COMPLETE for trial in lived)
    assert len(study.trials) == 10


def test_a_diverged_trial_counts_as_bad_not_as_missing(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path, sampler="random")
    search(tmp_path, program, how="diverges").run(trials_of(study, tmp_path, 10))
    bad = [trial for trial in study.trials if trial.params["lr0"] > 1]
    assert bad
    assert all(trial.state == TrialState.PRUNED and trial.user_attrs[ENDING] == "diverged" for trial in bad)


def test_a_trial_that_a_signal_ended_is_run_again(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path)
    search(tmp_path, program, how="ended once").run(trials_of(study, tmp_path, 3))
    endings = [trial.user_attrs[ENDING] for trial in study.trials]
    assert endings == ["interrupted", "complete", "complete", "complete"]
    assert study.trials[0].params == DEFAULTS
    defaults = study.defaults()
    assert defaults is not None
    assert defaults.params == DEFAULTS


def test_a_program_that_ends_without_a_word_has_failed(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path)
    search(tmp_path, program, how="silent").run(trials_of(study, tmp_path, 2))
    assert all("status 3" in trial.user_attrs[REASON] for trial in study.trials)


@pytest.mark.parametrize(
    ("how", "says", "most"),
    [("mistake", "The defaults cannot be trained", 1), ("broken", "first [34] trials have all failed", 4)],
)
def test_a_search_that_can_only_fail_stops_and_says_why(
    tmp_path: Path, program: Sequence[str], how: str, says: str, most: int
) -> None:
    study = create(tmp_path)
    with pytest.raises(UserError, match=f"{says}.*: it is {how}"):
        search(tmp_path, program, how=how).run(trials_of(study, tmp_path, 50))
    failed = [trial for trial in study.trials if trial.user_attrs.get(ENDING) == "failed"]
    assert 1 <= len(failed) <= max(most, len(SLOTS))
    again = resume(tmp_path)  # when what was wrong is mended, the defaults are trained after all
    before = again.num_started()
    search(tmp_path, program).run(trials_of(again, tmp_path, before + 3))
    assert again.defaults() is not None
    assert len(again.best(50)) == 3


def test_failures_do_not_stop_a_search_that_something_has_ended_well_in(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path)
    trials = trials_of(study, tmp_path, 50)
    endings = ["complete", *["failed"] * 9]
    for ending in endings:
        job = trials.next("cores 0")
        assert job is not None
        value = 0.5 if ending == "complete" else None
        trials.finish(job, Outcome(ending=ending, value=value, reason="bad luck"), 1.0)  # type: ignore[arg-type]
    assert [trial.user_attrs[ENDING] for trial in study.trials] == endings


def test_failures_wait_for_the_defaults_that_are_on_their_way(tmp_path: Path) -> None:
    study = create(tmp_path)
    trials = trials_of(study, tmp_path, 50)
    jobs = [trials.next("cores 0") for _ in range(6)]
    for job in jobs[1:5]:
        assert job is not None
        trials.finish(job, Outcome(ending="failed", reason="too large"), 1.0)
    assert jobs[0] is not None
    with pytest.raises(UserError, match=r"first 5 trials have all failed.*too large"):
        trials.finish(jobs[0], Outcome(ending="failed", reason="out of memory"), 1.0)


def test_hopeless_trials_are_pruned_and_good_ones_are_not(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path, pruner="halving", sampler="random")
    slots = SLOTS[:1]  # in turn, so that what is known when a trial reports does not hang on the machine
    one = Search(
        slots=slots,
        command=program,
        base={"epochs": 18, "lr0": 0.01, "slow": 3},
        folder=tmp_path,
        objective=Objective(),
        show=lambda row: None,
    )
    one.run(trials_of(study, tmp_path, 12))
    ruinous = [trial for trial in study.trials if trial.params["lr0"] > 1.1]
    assert len(ruinous) >= 2
    assert study.trials[0].state == TrialState.COMPLETE
    assert all(trial.state == TrialState.PRUNED for trial in ruinous)
    assert study.best(1)[0].value == max(trial.value or 0.0 for trial in study.trials)


def test_the_end_of_the_time_interrupts_and_resuming_runs_the_same_values(
    tmp_path: Path, program: Sequence[str]
) -> None:
    import time

    study = create(tmp_path)
    assert not search(tmp_path, program, how="hangs").run(trials_of(study, tmp_path, 4), until=time.monotonic() + 1.0)
    stopped = [trial for trial in study.trials if trial.user_attrs.get(ENDING) == "interrupted"]
    assert len(stopped) == 2
    again = resume(tmp_path)
    assert again.num_started() == 0
    search(tmp_path, program).run(trials_of(again, tmp_path, 4))
    complete = [trial for trial in again.trials if trial.state == TrialState.COMPLETE]
    assert len(complete) == 4
    assert [trial.params for trial in complete[:2]] == [trial.params for trial in stopped]
    assert complete[0].user_attrs[ROLE] == "defaults"


SEARCHER = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from test_search import create, search, trials_of
folder = Path({folder!r})
search(folder, {program!r}, how="hangs").run(trials_of(create(folder), folder, 5))
"""


def test_a_killed_search_leaves_nothing_running_and_loses_only_what_ran(tmp_path: Path, program: Sequence[str]) -> None:
    study_folder = tmp_path / "study"
    study_folder.mkdir()
    text = SEARCHER.format(here=str(Path(__file__).parent), folder=str(study_folder), program=list(program))
    victim = subprocess.Popen([sys.executable, "-c", text])
    pids = [study_folder / folder_of(number) / "pid" for number in range(2)]
    waiting = threading.Event()
    for _ in range(600):
        if all(pid.exists() and pid.read_text() for pid in pids):
            break
        assert victim.poll() is None
        waiting.wait(0.05)
    children = [psutil.Process(int(pid.read_text())) for pid in pids]
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not psutil.wait_procs(children, timeout=20)[1]
    again = resume(study_folder)
    assert [trial.user_attrs.get(ENDING) for trial in again.trials[:2]] == ["interrupted", "interrupted"]
    search(study_folder, program).run(trials_of(again, study_folder, 5))
    assert sum(trial.state == TrialState.COMPLETE for trial in again.trials) == 5
    assert again.defaults() is not None


def test_a_trial_that_had_ended_before_the_kill_is_not_run_again(tmp_path: Path) -> None:
    study = create(tmp_path)
    asked = study.ask("cores 0")
    folder = tmp_path / folder_of(asked.number)
    folder.mkdir()
    (folder / "ending.json").write_text(json.dumps({"ending": "complete", "reason": ""}))
    line = {"kind": "epoch", "epoch": 1, "elapsed_s": 1.0, "evaluation": {"ap": 0.25}}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    # As if the process that owns the trial had died: its start does not fit any that lives.
    study.optuna._storage.set_trial_user_attr(
        study.trials[0]._trial_id, "owner", study.trials[0].user_attrs["owner"] | {"started": 1.0}
    )
    again = resume(tmp_path)
    assert [(trial.state, trial.value) for trial in again.trials] == [(TrialState.COMPLETE, 0.25)]


def test_a_locked_storage_only_delays(tmp_path: Path, program: Sequence[str]) -> None:
    study = create(tmp_path)
    lock = sqlite3.connect(tmp_path / "study.db", check_same_thread=False, isolation_level=None)
    shown = threading.Event()
    rows: list[Row] = []

    class Locking(list[Row]):
        def append(self, row: Row) -> None:
            rows.append(row)
            if not shown.is_set():  # lock as soon as the first trial runs, free it a while later
                shown.set()
                lock.execute("BEGIN EXCLUSIVE")
                threading.Timer(1.5, lambda: lock.execute("COMMIT")).start()

    search(tmp_path, program, Locking()).run(trials_of(study, tmp_path, 4))  # type: ignore[arg-type]
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4


def test_a_study_of_something_else_is_refused(tmp_path: Path) -> None:
    create(tmp_path)
    with pytest.raises(UserError, match="already"):
        create(tmp_path)
    for what in IDENTITY:
        other = IDENTITY | {what: "other"}
        with pytest.raises(UserError, match=f"another {what}"):
            Study.resume(
                storage(tmp_path), "s", SPACE, TuneConfig(), identity=other, seed=0, recover=lambda number: None
            )
    wider = SearchSpace(entries={"lr0": Range(low=0.001, high=20.0, log=True)})
    with pytest.raises(UserError, match="another space"):
        Study.resume(
            storage(tmp_path), "s", wider, TuneConfig(), identity=IDENTITY, seed=0, recover=lambda number: None
        )
    with pytest.raises(UserError, match="no study"):
        Study.resume(
            storage(tmp_path), "t", SPACE, TuneConfig(), identity=IDENTITY, seed=0, recover=lambda number: None
        )


@pytest.mark.parametrize("sampler", ["tpe", "gp", "qmc", "random"])
@pytest.mark.parametrize("pruner", ["halving", "hyperband", "median", "none"])
def test_every_sampler_works_with_every_pruner(tmp_path: Path, sampler: str, pruner: str) -> None:
    study = create(tmp_path, sampler=sampler, pruner=pruner)
    for number in range(6):
        asked = study.ask("cores 0")
        assert asked.number == number
        reached = 0.8 - abs(float(asked.values["lr0"]) - 0.3)
        for step in range(1, 10):
            study.report(number, float(step), reached * step / 9)
        study.finish(number, Outcome(ending="complete", value=reached), 9.0)
    drawn = [trial.params["lr0"] for trial in study.trials]
    assert len(set(drawn)) == 6
    assert all(0.001 <= value <= 10 for value in drawn)


@pytest.mark.parametrize("pruner", ["halving", "hyperband", "median"])
def test_nothing_is_ended_while_even_the_defaults_have_no_ap(tmp_path: Path, pruner: str) -> None:
    """The first five of nine evaluations say nothing; the bad trial ends after them, and the good one never does."""
    study = create(tmp_path, pruner=pruner, sampler="random")
    for _ in range(4):  # the defaults, and others that are as good
        known = study.ask("cores 0")
        for step in range(1, 10):
            study.report(known.number, float(step), 0.001 * (9 - step) if step < 6 else 0.1 * step)
        study.finish(known.number, Outcome(ending="complete", value=0.9), 9.0)
    ended = {}
    for kind, factor in (("bad", 0.1), ("good", 1.0)):
        trial = study.ask("cores 0")
        ended[kind] = [
            study.report(trial.number, float(step), 0.0 if step < 6 else factor * 0.1 * step) for step in range(1, 10)
        ]
        study.finish(trial.number, Outcome(ending="complete", value=factor * 0.9), 9.0)
    assert not any(ended["good"])
    assert not any(ended["bad"][:5])
    assert any(ended["bad"][5:])


def test_a_storage_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    for url in ("nonsense", f"sqlite:///{tmp_path}/missing/study.db", "nosuchdb://x/y"):
        with pytest.raises(UserError, match="cannot be kept"):
            Study.create(url, "s", SPACE, TuneConfig(), identity=IDENTITY, defaults=DEFAULTS, seed=0)


def test_confirmation_runs_every_seed_once_also_after_a_restart(tmp_path: Path, program: Sequence[str]) -> None:
    finalists = [
        Finalist(number=3, values={"lr0": 0.3}, is_defaults=False),
        Finalist(number=0, values={"lr0": 0.01}, is_defaults=True),
    ]
    file = tmp_path / "confirm.jsonl"
    file.write_text(
        json.dumps({"trial": 3, "seed": 1, "value": 0.9, "reason": "", "seconds": 1.0}) + '\n{"trial": 0, "se'
    )
    rows: list[Row] = []
    confirmation = Confirmation(finalists, range(1, 4), file)
    search(tmp_path, program, rows).run(confirmation)
    assert len({row.key for row in rows}) == 5
    best, other = confirmation.results()
    assert best.finalist.number == 3
    assert best.values == pytest.approx((0.9, 0.802, 0.803))
    assert other.values == pytest.approx((0.511, 0.512, 0.513))
    assert other.spread == pytest.approx(0.001)
    assert not Confirmation(finalists, range(1, 4), file)._waiting


def test_no_process_is_left_behind(tmp_path: Path, program: Sequence[str]) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    search(tmp_path, program).run(trials_of(create(tmp_path), tmp_path, 3))
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert not psutil.wait_procs(left, timeout=10)[1]
