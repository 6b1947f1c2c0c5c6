"""What `paceline val` takes over from the run that weights come from, and what it does without one."""

from __future__ import annotations

import logging
import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.commands.val import validate
from paceline.errors import UserError
from paceline.models.registry import build_model
from paceline.options import TrainOptions, ValOptions
from paceline.records import RunFolder
from paceline.training.checkpoint import WeightsHeader, save_weights

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.evaluation.evaluator import Evaluation


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights for one class, in a folder of no run."""
    file = tmp_path_factory.mktemp("models") / "best.safetensors"
    torch.manual_seed(0)
    header = WeightsHeader(model="yolov8n", names=("object",), imgsz=32, epoch=1, metrics={})
    save_weights(file, build_model("yolov8n", 1).state_dict(), header)
    return file


def val(project: Path, **more: object) -> Evaluation:
    flat = {"device": "cpu", "project": str(project), "plots": False, "workers": 1}
    return validate(ValOptions.from_flat(flat | more))


def test_weights_in_the_working_folder(
    weights: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(weights.parent)
    evaluation = val(tmp_path, model="best.safetensors", data=str(squares), single_cls=True)
    assert evaluation.record.ap >= 0


def test_what_lies_beside_a_folder_of_weights_is_no_run(weights: Path, squares: Path, tmp_path: Path) -> None:
    shutil.copytree(weights.parent, tmp_path / "models")
    (tmp_path / "config.yaml").write_text("colour: green\n")
    model = str(tmp_path / "models" / weights.name)
    assert val(tmp_path, model=model, data=str(squares), single_cls=True).record.ap >= 0
    with pytest.raises(UserError, match="val needs a data set"):
        val(tmp_path, model=model)


@pytest.mark.parametrize("inside", [False, True])
def test_the_weights_of_a_run_know_its_data(
    weights: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """Also where they are named from within the folder that they lie in."""
    run = make_run(tmp_path / "run", weights, data=str(squares), single_cls=True)
    monkeypatch.chdir(run / "weights" if inside else tmp_path)
    assert val(tmp_path, model="best.safetensors" if inside else "run").record.ap >= 0


def test_the_data_of_a_run_are_found_from_another_working_folder(
    weights: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", weights, data=f"{squares.parent.name}/{squares.name}", single_cls=True)
    RunFolder(path=run).append("run", {"data": str(squares)})
    monkeypatch.chdir(run)
    assert val(tmp_path, model=str(run)).record.ap >= 0


@pytest.mark.parametrize("named", ["as the run did", "in another way", ""])
def test_the_classes_of_a_run_are_taken_over_with_its_data(
    weights: Path, squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str
) -> None:
    run = make_run(tmp_path / "run", weights, data=str(squares), single_cls=True, classes=[1])
    monkeypatch.chdir(squares.parent)
    data = {"as the run did": str(squares), "in another way": squares.name, "": ""}[named]
    evaluation = val(tmp_path, model=str(run), data=data)
    expected = val(tmp_path, model=str(weights), data=str(squares), single_cls=True, classes=[1])
    both = val(tmp_path, model=str(weights), data=str(squares), single_cls=True)
    assert evaluation.record == expected.record
    assert evaluation.confusion.counts.sum() != both.confusion.counts.sum()


def test_another_data_set_keeps_its_own_classes(weights: Path, squares: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", weights, data=str(squares), single_cls=True)
    shutil.copytree(squares.parent, tmp_path / "other")
    with pytest.raises(UserError, match=r"is 2, but .* trained on 1; .* or single_cls=True"):
        val(tmp_path, model=str(run), data=str(tmp_path / "other" / squares.name))


@pytest.mark.parametrize("own_val", [True, False])
@pytest.mark.parametrize("inside", [True, False])
def test_one_warning_where_what_is_scored_may_have_been_trained_on(
    weights: Path,
    squares: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    own_val: bool,
    inside: bool,
) -> None:
    """A set without val is divided by the seed, which weights outside a run do not know."""
    monkeypatch.setattr(logging.getLogger("paceline"), "propagate", True)
    data = tmp_path / "set"
    shutil.copytree(squares.parent, data)
    if not own_val:
        (data / "data.yaml").write_text("train: images/train\nnames: [bright, dark]\n")
    model = make_run(tmp_path / "run", weights, data=str(data / "data.yaml"), seed=3) if inside else weights
    with caplog.at_level(logging.WARNING, "paceline"):
        val(tmp_path, model=str(model), data=str(data / "data.yaml"), single_cls=True)
    warnings = [record.getMessage() for record in caplog.records if "may have been trained on" in record.getMessage()]
    assert len(warnings) == (not own_val and not inside)


def make_run(folder: Path, weights: Path, **options: object) -> Path:
    """Write what a run leaves behind: its options and its best weights."""
    shutil.copytree(weights.parent, folder / "weights")
    TrainOptions.from_flat({"model": "yolov8n", **options}).write(folder / "config.yaml")
    return folder
