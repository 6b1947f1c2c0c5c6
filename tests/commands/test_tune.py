"""A search from options to answer: what is refused, what is written, and what the answer is worth by hand."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from paceline.commands.train import TrainResult
from paceline.commands.trial import ending_of
from paceline.commands.tune import settle_tune, tune
from paceline.errors import UserError
from paceline.options import TrainOptions, TuneOptions
from paceline.records import EndRecord, RunFolder
from paceline.training.divergence import DivergedError
from paceline.tuning.outcome import Outcome
from paceline.yolo import YOLO

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.commands.tune_answer import TuneResult
    from paceline.tuning.search import Source

SMALL = {"data": "shapes", "epochs": 1, "imgsz": 32, "batch": 8, "fraction": 0.05, "amp": "off"}


def refused(**options: object) -> str:
    with pytest.raises(UserError) as caught:
        tune(settle_tune(SMALL | options), lambda row: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_mistakes_are_named_before_anything_is_written(tmp_path: Path) -> None:
    project = {"project": tmp_path / "runs"}
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}")
    unknown = tmp_path / "unknown.yaml"
    unknown.write_text("epochs: {low: 1, high: 3}")
    assert "needs an end" in refused(**project)
    assert "objective" in refused(**project, trials=1, objective="loss")
    assert "device=0,1" in refused(**project, trials=1, devices=2)
    assert "val=False" in refused(**project, trials=1, val=False)
    assert "at most that many" in refused(**project, trials=1, cores_per_trial=1000)
    assert "names nothing" in refused(**project, trials=1, space=empty)
    assert "epochs cannot be searched" in refused(**project, trials=1, space=unknown)
    assert "Cannot read" in refused(**project, trials=1, space=tmp_path / "none.yaml")
    assert "lr0=9.0" in refused(**project, trials=1, optimizer="SGD", lr0=9.0)
    assert "no folder of a search" in refused(**project, trials=1, resume="nothing")
    assert "no search to resume" in refused(**project, trials=1, resume=True)
    assert "trials=NUMBER" in refused(**project, iterations=10)
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_not_there_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    project = {"project": tmp_path / "runs", "trials": 1}
    assert "pickle" in refused(**project, model="yolo11n.pt")
    assert "yolo11q" in refused(**project, model="yolo11q")
    assert "do not exist" in refused(**project, model="missing/best.safetensors")
    file = tmp_path / "half.yaml"
    file.write_text("close_mosaic: {low: 0, high: 20, step: 0.5}")
    assert "whole step" in refused(**project, space=file)
    assert not (tmp_path / "runs").exists()


def test_a_trial_says_whether_the_user_can_mend_why_it_failed(tmp_path: Path) -> None:
    order = {"options": {**SMALL, "model": "yolo11q", "project": str(tmp_path), "name": "0"}, "folder": str(tmp_path)}
    command = [sys.executable, "-m", "paceline.commands.trial", str(min(os.sched_getaffinity(0)))]
    trial = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert trial.stdin is not None
    trial.stdin.write(json.dumps(order).encode() + b"\n")
    trial.stdin.flush()  # and left open: its end would end the trial
    assert trial.wait(120) == 0
    trial.stdin.close()
    told = json.loads((tmp_path / "ending.json").read_text())
    assert (told["ending"], told["is_mendable"]) == ("failed", True)


@pytest.mark.parametrize(
    ("end", "ending", "mendable"),
    [
        ("finished", "complete", False),
        ("stopped early", "complete", False),
        ("preempted", "interrupted", False),
        (DivergedError("lower lr0"), "diverged", False),
        (UserError("/data/diverged/data.yaml does not exist; check the path."), "failed", True),
        (MemoryError(), "failed", False),
        (ZeroDivisionError("by nothing"), "failed", False),
    ],
)
def test_a_trial_tells_how_its_run_ended(end: str | Exception, ending: str, mendable: bool) -> None:
    """One that a signal has ended on its way is no result of its values."""

    def run() -> TrainResult:
        if isinstance(end, Exception):
            raise end
        record = EndRecord(folder=Path(), reason=end, epochs=1, best_epoch=1, best=None, wall_s=1.0)
        return TrainResult(folder=RunFolder(path=Path()), end=record, evaluation=None)

    told = ending_of(run)
    assert (told["ending"], told["is_mendable"]) == (ending, mendable)
    assert bool(told["reason"]) == (ending != "complete")


class QuickSearch:
    """In the place of the search: every trial has ended well as soon as it was taken."""

    def __init__(self, **options: object) -> None:
        pass

    def run(self, source: Source, *, until: float | None = None) -> bool:
        while (job := source.next("cores 0")) is not None:
            source.finish(job, Outcome(ending="complete", value=0.25), 1.0)
        return True


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., TuneResult]:
    """Run a search without training."""
    monkeypatch.setattr("paceline.commands.tune.Search", QuickSearch)

    def run(**options: object) -> TuneResult:
        return tune(settle_tune({"project": tmp_path / "runs", "trials": 2} | options), lambda row: None)

    return run


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(file.relative_to(folder)): (file.stat().st_mtime_ns, file.read_bytes())
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_search_that_is_refused_changes_nothing(tmp_path: Path, quick: Callable[..., TuneResult]) -> None:
    shared = SMALL | {"name": "street", "storage": f"sqlite:///{tmp_path}/shared.db"}
    folder = quick(**shared).folder
    (folder / "trials" / "00000").mkdir()
    (folder / "trials" / "00000" / "metrics.jsonl").write_text("{}\n")
    before = files_of(folder)
    for options in (shared | {"exist_ok": True, "epochs": 7}, shared):
        with pytest.raises(UserError, match="already"):
            quick(**options)
        assert files_of(folder) == before
    with pytest.raises(UserError, match="already"):  # the name is taken in the storage, not on this machine
        quick(**shared, project=tmp_path / "other")
    assert not (tmp_path / "other").exists()
    resumed = settle_tune({"resume": str(folder), "trials": 4})
    with pytest.raises(UserError, match="another model"):
        tune(dataclasses.replace(resumed, model="yolo11s"), lambda row: None)
    assert files_of(folder) == before


def test_a_search_begun_anew_in_its_folder_has_nothing_of_the_old_one(
    tmp_path: Path, quick: Callable[..., TuneResult]
) -> None:
    folder = quick(**SMALL, name="street").folder
    (folder / "trials" / "00007").mkdir()
    (folder / "confirm.jsonl").write_text("{}\n")
    again = quick(**SMALL, name="street", exist_ok=True, trials=1)
    assert again.num_trials == 1
    assert again.folder == folder
    assert not [*(folder / "trials").iterdir()]
    assert not (folder / "confirm.jsonl").exists()


def test_a_machine_may_join_too_early_and_with_a_mistake_and_again(
    tmp_path: Path, quick: Callable[..., TuneResult]
) -> None:
    shared = SMALL | {"storage": f"sqlite:///{tmp_path}/shared.db"}
    first, second = {"project": tmp_path / "first"}, {"project": tmp_path / "second"}
    joining = shared | second | {"resume": "street"}
    with pytest.raises(UserError, match="no study street"):
        quick(**joining)
    assert not (tmp_path / "second").exists()
    with pytest.raises(UserError, match="no search to resume"):
        quick(**second, resume=True)
    quick(**shared, **first, name="street")
    with pytest.raises(UserError, match="another model"):
        quick(**joining, model="yolo11s")
    assert not (tmp_path / "second").exists()
    assert quick(**joining, trials=4).num_trials == 4
    assert quick(**joining, trials=5).num_trials == 5  # the very same command goes on
    with pytest.raises(UserError, match="keeps its own epochs, imgsz; leave them out"):
        quick(**joining | {"epochs": 2, "imgsz": 64})
    assert quick(**second, resume=True, trials=6).num_trials == 6


def test_a_space_that_is_given_again_must_be_the_same(tmp_path: Path, quick: Callable[..., TuneResult]) -> None:
    file, copy = tmp_path / "space.yaml", tmp_path / "copy.yaml"
    file.write_text("lr0: {low: 0.0001, high: 0.1, log: true}")
    copy.write_text(file.read_text())
    quick(**SMALL, space=file)
    assert quick(resume="tune", space=copy, trials=3).num_trials == 3
    file.write_text("lr0: {low: 0.0001, high: 0.2, log: true}")
    with pytest.raises(UserError, match="keeps its own space"):
        quick(resume="tune", space=file, trials=4)


def test_a_folder_with_another_name_still_finds_its_study(tmp_path: Path, quick: Callable[..., TuneResult]) -> None:
    shared = SMALL | {"storage": f"sqlite:///{tmp_path}/shared.db"}
    quick(**SMALL).folder.rename(tmp_path / "mine")
    assert quick(resume=str(tmp_path / "mine"), trials=3).num_trials == 3
    assert quick(resume=str(tmp_path / "mine"), trials=4).num_trials == 4
    quick(**shared, name="street", project=tmp_path / "first")
    joining = shared | {"resume": "street", "name": "here"}
    assert quick(**joining, trials=3).folder == tmp_path / "runs" / "here"
    assert quick(**joining, trials=4).num_trials == 4
    assert quick(resume="here", trials=5).num_trials == 5


def test_the_answer_of_a_measure_within_seconds_trains_as_long_as_it_is_told(
    tmp_path: Path, quick: Callable[..., TuneResult]
) -> None:
    result = quick(**SMALL, objective="ap@10m", time="2h")
    options = TrainOptions.read(result.best, {"epochs": 300})
    assert (options.loop.time, options.loop.epochs) == ("", 300)
    head = [line for line in result.best.read_text().splitlines() if line.startswith("# ")]
    assert any("time=600s" in line for line in head)
    assert any("time=600s" in line and str(result.best) in line for line in result.summary)
    plain = quick(**SMALL)
    assert TrainOptions.read(plain.best).loop.time == ""
    assert not any("time=" in line for line in plain.summary)


def test_the_confirmation_comes_after_the_time_and_says_how_long_it_takes(
    quick: Callable[..., TuneResult], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "paceline"):
        result = quick(**SMALL, time="1s", confirm=3, finalists=2, trials=4)
    assert {len(entry.values) for entry in result.confirmed} == {3}
    assert any("time=1s is for the search" in line for line in caplog.messages)
    runs = 3 * len(result.confirmed)
    assert any(f"{runs} runs, about 1 minute" in line for line in caplog.messages)


def test_a_search_in_which_nothing_ended_well_names_the_reason(
    tmp_path: Path, quick: Callable[..., TuneResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: QuickSearch, source: Source, *, until: float | None = None) -> bool:
        while (job := source.next("cores 0")) is not None:
            source.finish(job, Outcome(ending="failed", reason="the disk is full."), 1.0)
        return True

    monkeypatch.setattr(QuickSearch, "run", run)
    with pytest.raises(UserError, match=r"most failed for this: the disk is full\. .*report\.html"):
        quick(**SMALL)
    with pytest.raises(UserError, match=r"first 3 trials have all failed.*: the disk is full\."):
        quick(**SMALL, trials=9)


@pytest.mark.slow
def test_a_search_ends_with_an_answer_that_can_be_trained_and_resumed(tmp_path: Path) -> None:
    space = {"lr0": {"low": 0.0001, "high": 0.1, "log": True}, "mosaic": {"low": 0.0, "high": 1.0}}
    model = YOLO("yolo11n")
    result = model.tune(**SMALL, project=tmp_path, space=space, trials=3, confirm=2, finalists=1)  # type: ignore[arg-type]
    assert result.num_trials == 3
    assert set(result.values) == {"lr0", "mosaic"}
    assert {len(entry.values) for entry in result.confirmed} == {2}
    options = TrainOptions.read(result.best)
    assert options.optim.lr0 == result.values["lr0"]
    assert options.optim.optimizer in {"SGD", "AdamW"}
    page = result.page.read_text(encoding="utf-8")
    assert "<script src=" not in page
    assert all(heading in page for heading in ("History", "Configurations", "Devices", "All trials"))
    first = yaml.safe_load((result.folder / "trials" / "00000" / "config.yaml").read_text())
    assert first["mosaic"] == TrainOptions().augment.mosaic

    again = settle_tune({"resume": str(result.folder), "trials": 4})
    assert isinstance(again, TuneOptions)
    more = tune(again, lambda row: None)
    assert more.num_trials == 4
    assert more.folder == result.folder
    with pytest.raises(UserError, match="keeps its own epochs"):
        settle_tune({"resume": str(result.folder), "trials": 5, "epochs": 2})
