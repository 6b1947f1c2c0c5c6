"""Whole runs on a tiny data set: what they leave behind, and that a resumed one equals an undisturbed one."""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from paceline.callbacks import Callback
from paceline.commands.evaluation import evaluate_network
from paceline.commands.pictures import RunPictures
from paceline.commands.train import TrainResult, train
from paceline.commands.val import validate
from paceline.errors import UserError
from paceline.options import TrainOptions, ValOptions
from paceline.training.checkpoint import ResumePoint, load_resume_point, save_resume_point
from paceline.training.state import TrainingState

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.records import EndRecord, EpochRecord, EvaluationRecord, RunRecord, StepRecord


@pytest.fixture(autouse=True, scope="module")
def _threads_stay() -> Iterator[None]:
    """Whole runs are compared to the last bit, which depends on the number of threads: it is not for a crowd to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


class StopsAtOnce(Callback):
    """Interrupts a run at its first step."""

    def on_step(self, record: StepRecord) -> None:
        raise KeyboardInterrupt


def options(data_yaml: Path, project: Path, **more: object) -> TrainOptions:
    flat: dict[str, object] = {
        "data": str(data_yaml), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 2, "nbs": 8, "workers": 2,
        "amp": "off", "device": "cpu", "plots": False, "project": str(project), "close_mosaic": 1,
    }  # fmt: skip
    return TrainOptions.from_flat(flat | more)


class Witness(Callback):
    """Notes the order of what it is told; stops the run where it is asked to."""

    def __init__(self, *, stop_after: int = 0) -> None:
        self.seen: list[str] = []
        self.epochs: list[EpochRecord] = []
        self._stop_after = stop_after

    def on_start(self, record: RunRecord) -> None:
        self.seen.append("start")

    def on_step(self, record: StepRecord) -> None:
        self.seen.append(f"step {record.step}/{record.steps_in_epoch}")

    def on_evaluation(self, epoch: int, record: EvaluationRecord) -> None:
        self.seen.append(f"evaluation {epoch}")

    def on_epoch(self, record: EpochRecord) -> None:
        self.seen.append(f"epoch {record.epoch}")
        self.epochs.append(record)
        if record.epoch == self._stop_after:
            raise KeyboardInterrupt

    def on_end(self, record: EndRecord) -> None:
        self.seen.append("end")


@pytest.fixture(scope="module")
def finished(squares: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Witness]:
    witness = Witness()
    project = tmp_path_factory.mktemp("runs")
    return train(options(squares, project, plots=True, name="first"), [witness]), witness


def test_a_run_leaves_everything_a_user_looks_for(finished: tuple[TrainResult, Witness]) -> None:
    result, _ = finished
    files = {str(path.relative_to(result.folder.path)) for path in result.folder.path.rglob("*") if path.is_file()}
    weights = {f"weights/{stem}.{kind}" for stem in ("best", "last") for kind in ("safetensors", "json")}
    pictures = {f"pictures/train_batch{number}.jpg" for number in (1, 2, 3)} | {
        f"pictures/{stem}"
        for stem in ("predictions1.jpg", "pr_curve.png", "f1_curve.png", "confusion_matrix.png", "run.png")
    }
    assert files >= weights | pictures | {"config.yaml", "metrics.jsonl", "weights/resume.safetensors"}
    assert result.end.epochs == 2
    assert result.evaluation is not None
    assert json.loads((result.folder.weights / "best.json").read_text())["names"] == ["bright", "dark"]


def test_callbacks_are_told_in_order(finished: tuple[TrainResult, Witness]) -> None:
    steps = [f"step {number}/3" for number in (1, 2, 3)]
    expected = ["start", *steps, "evaluation 1", "epoch 1", *steps, "evaluation 2", "epoch 2", "end"]
    assert finished[1].seen == expected


def test_spans_sum_to_the_wall_time(finished: tuple[TrainResult, Witness]) -> None:
    lines = list(finished[0].folder.records("epoch"))
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert sum(line["spans_s"].values()) == pytest.approx(line["wall_s"], rel=0.01)
        assert {
            "data",
            "forward",
            "loss",
            "backward",
            "optimiser",
            "evaluation",
            "checkpoint",
            "device_wait",
            "other",
        } <= (line["spans_s"].keys())
        assert line["background_s"]["render_s"] > 0
    assert lines[0]["background_s"]["decodes"] == 12
    assert lines[1]["background_s"]["decodes"] == 0


def test_no_thread_is_left(finished: tuple[TrainResult, Witness]) -> None:
    assert finished[0].end.reason == "finished"
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    assert not [name for name in names if "paceline" in name.lower() or "loader" in name.lower()]


def test_validating_the_best_weights_gives_the_figures_of_the_run(
    finished: tuple[TrainResult, Witness], tmp_path: Path
) -> None:
    result, _ = finished
    flat = {"model": str(result.folder.path), "device": "cpu", "project": str(tmp_path), "save_json": True}
    evaluation = validate(ValOptions.from_flat(flat))
    assert result.evaluation is not None
    assert evaluation.record.ap == pytest.approx(result.evaluation.ap, abs=1e-6)
    detections = json.loads((tmp_path / "val" / "detections.json").read_text())
    assert len(detections) == len(evaluation.detections)


def last_weights(result_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(result_folder / "weights" / "last.safetensors")


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_resumed_run_equals_an_undisturbed_one(squares: Path, tmp_path: Path, optimizer: str) -> None:
    more = {"epochs": 3, "optimizer": optimizer, "lr0": 0.002, "nbs": 16}
    whole = train(options(squares, tmp_path, name="whole", **more))
    assert whole.end.epochs == 3
    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, name="cut", **more), [Witness(stop_after=1)])
    resumed = train(TrainOptions.from_flat({"resume": str(tmp_path / "cut")}))
    assert resumed.end.epochs == 3
    repeats = TrainOptions.read(resumed.folder.config)
    assert repeats.loop.resume == ""  # it would go on with this run otherwise
    expected, found = last_weights(whole.folder.path), last_weights(resumed.folder.path)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    assert [line["epoch"] for line in resumed.folder.records("epoch")] == [1, 2, 3]


def test_the_seed_decides_everything(squares: Path, tmp_path: Path) -> None:
    runs = [train(options(squares, tmp_path, seed=seed, epochs=1)) for seed in (3, 3, 4)]
    first, again, other = (last_weights(run.folder.path) for run in runs)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert [run.folder.path.name for run in runs] == ["train", "train2", "train3"]


def test_weights_go_on_to_other_classes(
    finished: tuple[TrainResult, Witness], squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = finished[0].best_weights
    still = {"lr0": 1e-12, "optimizer": "SGD", "warmup_bias_lr": 0, "epochs": 1}
    with caplog.at_level("INFO", "paceline"):
        result = train(options(squares, tmp_path, model=str(best), single_cls=True, **still))
    assert any("left out" in message and "model.23" in message for message in caplog.messages)
    kept, source = last_weights(result.folder.path), load_file(best)
    torch.testing.assert_close(kept["model.0.conv.weight"], source["model.0.conv.weight"], atol=1e-7, rtol=0)
    assert kept["model.23.cv3.0.2.weight"].shape[0] == 1


def test_frozen_nodes_do_not_change(finished: tuple[TrainResult, Witness], squares: Path, tmp_path: Path) -> None:
    best = finished[0].best_weights
    result = train(options(squares, tmp_path, model=str(best), freeze=5, epochs=1))
    found, source = last_weights(result.folder.path), load_file(best)
    for key, value in source.items():
        if int(key.split(".")[1]) < 5:
            assert torch.equal(found[key], value), key
    assert not torch.equal(found["model.22.cv2.conv.weight"], source["model.22.cv2.conv.weight"])


def test_patience_stops_a_run_that_does_not_get_better(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[object] = []

    def evaluate_once(*arguments: object, **keywords: object) -> object:
        if not first:
            first.append(evaluate_network(*arguments, **keywords))  # type: ignore[arg-type]
        return first[0]

    monkeypatch.setattr("paceline.commands.evaluation.evaluate_network", evaluate_once)
    result = train(options(squares, tmp_path, epochs=9, patience=2))
    assert result.end.reason == "stopped early"
    assert result.end.epochs == 3
    assert result.end.best_epoch == 1


@pytest.mark.parametrize(("close_mosaic", "says"), [(2, True), (1, False)])
def test_a_run_that_is_too_short_for_mosaics_says_so(
    squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, close_mosaic: int, says: bool
) -> None:
    with caplog.at_level("INFO", "paceline"), pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, close_mosaic=close_mosaic), [StopsAtOnce()])
    assert any(message.startswith("No mosaics: ") for message in caplog.messages) == says


def test_a_time_budget_ends_the_run(squares: Path, tmp_path: Path) -> None:
    result = train(options(squares, tmp_path, epochs=10_000, time="4s"))
    assert result.end.reason == "time budget spent"
    assert 1 <= result.end.epochs < 10_000
    assert result.end.wall_s < 8


def test_without_evaluation_the_last_epoch_is_evaluated_all_the_same(squares: Path, tmp_path: Path) -> None:
    result = train(options(squares, tmp_path, epochs=3, val=False, save_period=2))
    assert [line["evaluation"] is not None for line in result.folder.records("epoch")] == [False, False, True]
    assert result.best_weights.is_file()
    assert (result.folder.weights / "epoch2.safetensors").is_file()


def test_evaluations_keep_their_interval_and_the_last_epoch_has_one(squares: Path, tmp_path: Path) -> None:
    result = train(options(squares, tmp_path, epochs=5, val_interval=2))
    evaluated = [line["evaluation"] is not None for line in result.folder.records("epoch")]
    assert evaluated == [False, True, False, True, True]
    assert result.end.best_epoch in {2, 4, 5}


def test_patience_waits_for_an_evaluation(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first: list[object] = []

    def evaluate_once(*arguments: object, **keywords: object) -> object:
        if not first:
            first.append(evaluate_network(*arguments, **keywords))  # type: ignore[arg-type]
        return first[0]

    monkeypatch.setattr("paceline.commands.evaluation.evaluate_network", evaluate_once)
    result = train(options(squares, tmp_path, epochs=20, patience=1, val_interval=3))
    assert (result.end.epochs, result.end.best_epoch) == (6, 3)


def test_a_batch_larger_than_the_set_is_lowered(
    squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = train(options(squares, tmp_path, batch=64, epochs=1))
    assert next(iter(result.folder.records("epoch")))["images"] == 12
    assert any("the batch is 12" in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"data": "nowhere.yaml"}, "nowhere"),
        ({"model": "yolo12q"}, "yolo12q"),
        ({"model": "yolo11n.pt"}, "pickle"),
        ({"model": "gone/best.safetensors"}, "do not exist"),
        ({"device": "7"}, "GPU 7"),
        ({"time": "soon"}, "duration"),
        ({"freeze": 99}, "freeze=99"),
        ({"resume": "nowhere"}, "nowhere"),
        ({"amp": "fp16"}, "needs a GPU"),
        ({"cache": "device"}, "keeps the images on a GPU"),
        ({"batch": 1, "imgsz": 32}, "no variance"),
        ({"batch": 1, "imgsz": 64, "multi_scale": True}, "no variance"),
    ],
)
def test_mistakes_get_one_sentence_and_nothing_is_written(
    squares: Path, tmp_path: Path, more: dict[str, object], sentence: str
) -> None:
    project = tmp_path / "runs"
    with pytest.raises(UserError, match=sentence):
        train(options(squares, project, **more))
    assert not project.exists()


def test_a_named_run_that_exists_is_not_overwritten(squares: Path, tmp_path: Path) -> None:
    result = train(options(squares, tmp_path, name="mine", epochs=1))
    assert repr(result).startswith(f"<TrainResult {tmp_path / 'mine'}: finished, epoch 1, the best was epoch 1: AP ")
    with pytest.raises(UserError, match="exists already"):  # before anything is read, measured or started
        train(options(tmp_path / "nothing.yaml", tmp_path, name="mine", epochs=1))
    again = train(options(squares, tmp_path, name="mine", epochs=1, exist_ok=True))
    assert len(list(again.folder.records("epoch"))) == 1


def test_a_run_in_the_folder_of_another_never_goes_on_from_it(squares: Path, tmp_path: Path) -> None:
    train(options(squares, tmp_path, name="mine", epochs=1))
    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, name="mine", exist_ok=True, lr0=0.1), [StopsAtOnce()])
    with pytest.raises(UserError, match=r"no weights/resume\.safetensors"):
        train(TrainOptions.from_flat({"resume": str(tmp_path / "mine")}))
    assert not (tmp_path / "mine" / "DONE").exists()
    assert not list((tmp_path / "mine").rglob("*.safetensors"))


def test_pictures_show_the_best_weights_also_after_the_run_went_on(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, name="cut", plots=True), [Witness(stop_after=1)])
    file = tmp_path / "cut" / "weights" / "resume.safetensors"
    point = load_resume_point(file)
    state = TrainingState.from_json(point.values["state"])
    state.best_ap = 0.99  # no later epoch comes near
    save_resume_point(file, ResumePoint(tensors=point.tensors, values=point.values | {"state": state.to_json()}))
    drawn = []
    monkeypatch.setattr(RunPictures, "evaluation", lambda self, evaluation, *more: drawn.append(evaluation))
    monkeypatch.setattr(RunPictures, "curves", lambda self: drawn.append("curves"))
    resumed = train(TrainOptions.from_flat({"resume": str(tmp_path / "cut")}))
    assert resumed.end.best_epoch == 1
    flat = {"model": str(tmp_path / "cut"), "device": "cpu", "project": str(tmp_path), "plots": False}
    best = validate(ValOptions.from_flat(flat))
    (evaluation, curves) = drawn
    assert curves == "curves"
    np.testing.assert_allclose(evaluation.detections.scores, best.detections.scores, atol=1e-6)
    assert len(best.detections.scores)


def test_the_resolved_config_repeats_the_run(finished: tuple[TrainResult, Witness], tmp_path: Path) -> None:
    result, _ = finished
    again = train(TrainOptions.read(result.folder.config, {"project": str(tmp_path), "plots": False}))
    first, second = last_weights(result.folder.path), last_weights(again.folder.path)
    assert all(np.array_equal(first[key].numpy(), second[key].numpy()) for key in first)
