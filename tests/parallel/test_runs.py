"""Whole runs of `train` under every layout: one checkpoint, one log, the figures of one process, and going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import Losses
from safetensors.torch import load_file
from worlds import Case, run_world

from paceline.commands.layout import ranks_to_launch
from paceline.commands.train import train
from paceline.data.shapes import ShapesConfig, ensure
from paceline.errors import UserError
from paceline.options import TrainOptions, settle_resume
from paceline.records import RunFolder


def options(data: Path, project: Path, **more: Any) -> dict[str, Any]:
    """A short run whose images the batch does not divide."""
    flat: dict[str, Any] = {
        "data": str(data), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 3, "nbs": 8, "workers": 1,
        "amp": "off", "device": "cpu", "plots": False, "project": str(project), "close_mosaic": 1, "lr0": 0.0005,
        "warmup_bias_lr": 0.0, "optimizer": "SGD",
    }  # fmt: skip
    return flat | more


LAYOUTS: dict[str, dict[str, Any]] = {
    "sync": {"bn": "sync"},
    "fsdp": {"parallel": "fsdp", "bn": "sync"},
    "pipeline": {"parallel": "pipeline", "microbatches": 2},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A data set of 11 + 5 images, and where runs go."""
    data = ensure(tmp_path_factory.mktemp("shapes"), ShapesConfig(train=11, val=5))
    return data, tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def runs(folders: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs on two ranks, with evaluations within and beside them; then two go on for an epoch under another layout."""
    data, project = folders
    cases = {
        name: Case("run_cases", "run", options(data, project, name=name, **more)) for name, more in LAYOUTS.items()
    }
    for name, more in LAYOUTS.items():
        beside = options(data, project, name=f"{name} beside", val_async=True, **more)
        cases[f"{name} beside"] = Case("run_cases", "run", beside)
    for name, more in (("sync", {"parallel": "pipeline", "microbatches": 2}), ("pipeline", {"parallel": "data"})):
        cases[f"{name} goes on"] = Case("run_cases", "go_on", {"folder": str(project / name), **more})
    return run_world(tmp_path_factory.mktemp("two"), 2, cases, limit_s=900.0)


@pytest.fixture(scope="module")
def single(folders: tuple[Path, Path]) -> tuple[Path, list[tuple[float, ...]]]:
    """The same run in one process: its folder and its losses."""
    losses = Losses()
    result = train(TrainOptions.from_flat(options(*folders, name="single")), [losses])
    return result.folder.path, losses.losses


@pytest.mark.parametrize("layout", ["sync", "fsdp"])
def test_ranks_that_normalise_together_train_what_one_process_trains(
    runs: dict[str, Any], single: tuple[Path, list[tuple[float, ...]]], layout: str
) -> None:
    folder, losses = single
    for found, expected in zip(runs[layout]["losses"], losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    weights = load_file(Path(runs[layout]["folder"]) / "weights" / "last.safetensors")
    expected_weights = load_file(folder / "weights" / "last.safetensors")
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key].float(), value.float(), rtol=1e-3, atol=1e-4, msg=key)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_leaves_one_folder_with_the_same_keys(
    runs: dict[str, Any], single: tuple[Path, list[tuple[float, ...]]], layout: str
) -> None:
    run = runs[layout]
    assert run["errors"] == ["", ""]
    first, second = run["evaluations"]
    assert first is not None
    assert first.num_images == 5
    assert second.ap == first.ap
    folder = Path(run["folder"])
    assert folder.name == layout, "a second rank would have counted up"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kinds = [line["kind"] for line in lines if "kind" in line]
    assert kinds == ["run", "epoch", "epoch", "epoch", "end"]
    epochs = [line for line in lines if line.get("kind") == "epoch"]
    assert [epoch["images"] for epoch in epochs[:3]] == [12, 12, 12], "of both ranks, in full batches"
    for file in ("last", "resume"):
        keys = load_file(folder / "weights" / f"{file}.safetensors").keys()
        assert keys == load_file(single[0] / "weights" / f"{file}.safetensors").keys()


@pytest.mark.parametrize("layout", ["sync", "pipeline"])
def test_a_run_goes_on_under_another_layout(runs: dict[str, Any], layout: str) -> None:
    run = runs[f"{layout} goes on"]
    assert run["errors"] == ["", ""]
    assert run["folder"] == runs[layout]["folder"] + "-on"
    assert len(run["losses"]) == 1, "one more epoch"
    before = sum(runs[layout]["losses"][-1])
    assert 0.2 * before < sum(run["losses"][0]) < 5 * before


def test_an_impossible_layout_is_refused_before_anything_starts(folders: tuple[Path, Path]) -> None:
    impossible = TrainOptions.from_flat(options(*folders, devices=4, stages=3, batch=8, name="never"))
    with pytest.raises(UserError, match="stages=2 or stages=4"):
        ranks_to_launch(impossible)
    with pytest.raises(UserError, match="multi_scale changes the image size"):
        ranks_to_launch(TrainOptions.from_flat(options(*folders, devices=2, stages=2, multi_scale=0.2, name="never")))
    with pytest.raises(UserError, match="give devices=2"):
        train(TrainOptions.from_flat(options(*folders, parallel="pipeline", name="never")))
    assert not (folders[1] / "never").exists()


def test_only_the_layout_may_change_when_a_run_goes_on() -> None:
    assert settle_resume({"resume": "runs/train", "parallel": "pipeline", "stages": 2})["stages"] == 2
    with pytest.raises(UserError, match="leave out bn"):
        settle_resume({"resume": "runs/train", "bn": "sync"})


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_evaluates_beside_the_training(runs: dict[str, Any], layout: str) -> None:
    within, beside = runs[layout], runs[f"{layout} beside"]
    assert beside["errors"] == ["", ""]
    loose = {"rtol": 1e-3, "atol": 1e-4} if layout == "pipeline" else {"rtol": 0.0, "atol": 0.0}  # cuts are measured
    torch.testing.assert_close(torch.tensor(beside["losses"]), torch.tensor(within["losses"]), **loose)
    folders = [RunFolder(path=Path(run["folder"])) for run in (within, beside)]
    for stem in ("last", "best"):
        expected, found = (load_file(folder.weights / f"{stem}.safetensors") for folder in folders)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key].float(), value.float(), msg=key, **loose)
    assert [line["epoch"] for line in folders[1].records("evaluation")] == [1, 2]
    expected_aps, aps = ([line["evaluation"]["ap"] for line in folder.epochs()] for folder in folders)
    assert aps == pytest.approx(expected_aps, abs=1e-3)
    assert len(aps) == 3
