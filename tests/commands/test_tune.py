"""A search from options to answer: what is refused, what is written, and what the answer is worth by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import yaml

from paceline.commands.tune import settle_tune, tune
from paceline.errors import UserError
from paceline.options import TrainOptions, TuneOptions
from paceline.yolo import YOLO

if TYPE_CHECKING:
    from pathlib import Path

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
