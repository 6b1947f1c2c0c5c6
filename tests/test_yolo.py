"""The Python face: what it holds, what it hands on, and that its keywords are the options."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import paceline
from paceline import YOLO
from paceline.callbacks import Callback
from paceline.errors import UserError
from paceline.keywords import BenchKeywords, PredictKeywords, TrainKeywords, ValKeywords
from paceline.models.catalogue import find_model
from paceline.models.registry import build_model
from paceline.options import BenchOptions, Options, PredictOptions, TrainOptions, ValOptions, option_fields
from paceline.training.checkpoint import WeightsHeader, save_weights

if TYPE_CHECKING:
    from pathlib import Path


class Watch(Callback):
    """A callback of a user."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with random weights for two classes."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    header = WeightsHeader(model="yolov8n", names=("disc", "ring"), imgsz=64, epoch=1, metrics={})
    save_weights(folder / "weights" / "best.safetensors", build_model("yolov8n", 2).state_dict(), header)
    return folder


@pytest.mark.parametrize(
    ("keywords", "options", "others"),
    [
        (TrainKeywords, TrainOptions, {"model"}),
        (BenchKeywords, BenchOptions, {"model"}),
        (ValKeywords, ValOptions, {"model"}),
        (PredictKeywords, PredictOptions, {"model", "source"}),
    ],
)
def test_keywords_are_the_options(keywords: type, options: type[Options], others: set[str]) -> None:
    assert set(keywords.__annotations__) == set(option_fields(options)) - others


def test_an_architecture_has_a_size_but_no_names() -> None:
    model = YOLO("yolo11n")
    assert model.names == {}
    assert model.info().num_parameters == find_model("yolo11n").params
    assert model.info().gflops == pytest.approx(find_model("yolo11n").gflops, abs=0.05)
    assert YOLO("yolo11n.yaml").info() == model.info()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("yolo11n.pt", "cannot read yet"),
        ("yolo11q", "yolo11"),
        ("yolo11n-seg", "only detection is offered"),
        ("yolo26n", "is not there yet; choose one of yolov8n"),
        ("runs/none/best.safetensors", "check the path"),
        ("yolov8s-seg.pt", r"\(model=yolov8s\)"),
        ("yolo8m.pt", r"\(model=yolov8m\)"),
        ("best.onnx", "best.onnx is an exported network"),
        ("nets/mine.yaml", "are not built from files such as nets/mine.yaml; choose one of yolov8n"),
        ("/", "weights/best.safetensors"),
    ],
)
def test_what_is_no_model_gets_a_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        YOLO(name)


def test_the_task_may_be_said_and_is_detection() -> None:
    assert YOLO("yolo11n", task="detect").model == YOLO("yolo11n").model
    with pytest.raises(UserError, match="task='segment': only detection is offered"):
        YOLO("yolo11n", task="segment")  # type: ignore[arg-type]


def test_weights_are_found_by_file_and_by_folder(run: Path) -> None:
    for name in (run, str(run), run / "weights" / "best.safetensors"):
        assert YOLO(name).names == {0: "disc", 1: "ring"}
    assert YOLO(run).info().num_classes == 2
    assert YOLO(run).info().imgsz == 64


def test_predict_stream_and_call_agree(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = YOLO(run)
    images = [np.random.default_rng(seed).integers(0, 256, (50, 80, 3), np.uint8) for seed in range(3)]
    results = model.predict(images, conf=0.0, max_det=5)
    assert [len(result) for result in results] == [5, 5, 5]
    for other in (model(images, conf=0.0, max_det=5), list(model.stream(images, conf=0.0, max_det=5, batch=1))):
        for result, again in zip(results, other, strict=True):
            assert torch.allclose(result.boxes.data, again.boxes.data, atol=1e-3)
    assert list(tmp_path.iterdir()) == []  # nothing is written unless it is asked for
    model.predict(images[0], conf=0.0, save=True)
    assert (tmp_path / "runs" / "predict" / "image0.jpg").is_file()


def test_an_architecture_cannot_predict() -> None:
    with pytest.raises(UserError, match="without weights"):
        YOLO("yolo11n").predict(np.zeros((32, 32, 3), np.uint8))


def test_train_hands_options_and_callbacks_on_and_holds_the_best_weights(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[TrainOptions, list[object]]] = []

    def train(options: TrainOptions, callbacks: list[object], transform: object) -> object:
        assert transform is None
        seen.append((options, callbacks))
        return SimpleNamespace(best_weights=run / "weights" / "best.safetensors")

    monkeypatch.setattr("paceline.commands.train.train", train)
    model, callback = YOLO("yolo11n"), Watch()
    model.train(data="shapes", epochs=3, amp=False, callbacks=[callback])
    options, callbacks = seen[0]
    assert (options.model, options.data.data, options.loop.epochs, options.loop.amp) == ("yolo11n", "shapes", 3, "off")
    assert callback in callbacks
    assert model.names == {0: "disc", 1: "ring"}
    assert model.model == str(run / "weights" / "best.safetensors")
    with pytest.raises(UserError, match="did you mean epochs"):
        model.train(epoch=3)  # type: ignore[call-arg]
    with pytest.raises(UserError, match="cannot be resumed"):  # no run has left these weights
        model.train(resume=True)
    (run / "weights" / "resume.safetensors").touch()
    TrainOptions.from_flat({"device": "cpu"}).write(run / "config.yaml")
    model.train(resume=True)
    (run / "weights" / "resume.safetensors").unlink()
    assert seen[1][0].loop.resume == model.model


@pytest.mark.parametrize("callbacks", [[print], [Watch], Watch(), {"on_train_end": print}, "watch", ["watch"], None])
def test_what_is_no_list_of_callbacks_is_answered_before_anything_is_read(callbacks: object) -> None:
    with pytest.raises(UserError, match=r"is no list of callbacks; derive .* callbacks=\[Watch\(\)\]"):
        YOLO("yolo11n").train(data="no/such.yaml", callbacks=callbacks)  # type: ignore[arg-type]


def test_info_says_what_it_counts(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "paceline")
    info = YOLO("yolo11n").info()
    assert caplog.messages == [f"{info}."]
    YOLO("yolo11n").info(verbose=False)
    assert caplog.messages == [f"{info}."]


def test_val_hands_its_options_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("paceline.commands.val.validate", lambda options: options)
    options = YOLO(run).val(split="test", conf=None)
    assert isinstance(options, ValOptions)
    assert (options.model, options.validation.split, options.postprocess.conf) == (str(run), "test", 0.001)


def test_importing_the_package_does_not_import_torch() -> None:
    import subprocess
    import sys

    code = "import sys, paceline; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert "YOLO" in paceline.__all__
