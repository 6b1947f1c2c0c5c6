"""Runs whose batch is measured, and runs whose memory gives out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml

from paceline.callbacks import Callback
from paceline.commands.layout import check_layout
from paceline.commands.memory import (
    Exhaustion,
    Fitted,
    FittingBatch,
    densest_batch,
    describe,
    fitting_images,
    most_images,
)
from paceline.commands.train import train
from paceline.commands.tune import tune
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.errors import UserError
from paceline.losses.detection import DetectionLoss
from paceline.options import TrainOptions, TuneOptions
from paceline.parallel.rank import Rank
from paceline.training.auto_batch import Choice, Line, Trial
from paceline.training.precision import Precision
from paceline.training.rehearsal import RehearsalMeter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.index import Index

GB = 10**9
CPU = torch.device("cpu")


def options(data: Path | str, project: Path, **more: object) -> TrainOptions:
    flat: dict[str, object] = {
        "data": str(data), "model": "yolo11n", "imgsz": 64, "batch": "auto", "epochs": 1, "nbs": 8, "workers": 1,
        "amp": "off", "device": "cpu", "plots": False, "project": str(project),
    }  # fmt: skip
    return TrainOptions.from_flat(flat | more)


class StopAfterOne(Callback):
    def on_epoch(self, record: object) -> None:
        raise KeyboardInterrupt


class StopAtTheStart(Callback):
    def on_start(self, record: object) -> None:
        raise KeyboardInterrupt


# batch=auto


def test_a_run_whose_batch_is_measured(squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It says its numbers, keeps the one that was used, and is resumed with that, whatever fits by then."""
    with caplog.at_level(logging.INFO, "paceline"), pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, epochs=2, name="job"), [StopAfterOne()])
    (said,) = (line for line in caplog.messages if "chosen in" in line)
    assert said.startswith("batch=8, chosen in ")  # 12 images, of which nbs lets 8 be a batch
    assert "GB that a device may take" in said
    assert "images/s" in said
    stored = yaml.safe_load((tmp_path / "job/config.yaml").read_text())
    assert (stored["batch"], stored["memory"]) == (8, 0.8)

    caplog.clear()
    resumed = TrainOptions.from_flat({"resume": str(tmp_path / "job")})
    with caplog.at_level(logging.INFO, "paceline"):
        result = train(resumed)
    assert result.end.epochs == 2
    assert not any("chosen in" in line for line in caplog.messages)
    assert yaml.safe_load((tmp_path / "job/config.yaml").read_text())["batch"] == 8


def test_resume_auto_keeps_the_measured_batch(squares: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in ("starts", "goes on"):
        caplog.clear()
        with caplog.at_level(logging.INFO, "paceline"):
            if step == "starts":
                with pytest.raises(KeyboardInterrupt):
                    train(options(squares, tmp_path, epochs=2, name="job", resume="auto"), [StopAfterOne()])
            else:
                train(options(squares, tmp_path, epochs=2, name="job", resume="auto"))
        assert any("chosen in" in line for line in caplog.messages) == (step == "starts")
        assert not any("not with the new" in line for line in caplog.messages)


def test_measuring_leaves_no_trace_in_the_weights(squares: Path, tmp_path: Path) -> None:
    """The same run with the number that was found, to the last bit."""
    measured = train(options(squares, tmp_path, name="auto"))
    given = train(options(squares, tmp_path, name="number", batch=8))
    first, second = (torch_weights(result.folder.path) for result in (measured, given))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def torch_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "weights" / "last.safetensors")


@pytest.mark.parametrize("val_async", [False, True])
def test_evaluation_beside_training_needs_its_own_room(
    squares: Path, tmp_path: Path, val_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def meter(**more: object) -> RehearsalMeter:
        seen.append(bool(more["beside"]))
        return RehearsalMeter(**more)  # type: ignore[arg-type]

    monkeypatch.setattr("paceline.commands.memory.RehearsalMeter", meter)
    train(options(squares, tmp_path, val_async=val_async))
    assert seen == [val_async]


def test_a_share_too_small_for_one_image_is_refused(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paceline.training.peak.free_memory_bytes", lambda: 1_000_000)
    with pytest.raises(UserError, match=r"not even one image fits .* raise memory="):
        train(options(squares, tmp_path, cache="none"))
    assert not list(tmp_path.iterdir())


def test_less_memory_means_a_smaller_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the whole of it: the second run is told that little is free."""
    flat = {"cache": "none", "nbs": 16, "imgsz": 128, "fraction": 0.1}
    limits = {}
    for free in (8 * GB, GB // 8):
        monkeypatch.setattr("paceline.training.peak.free_memory_bytes", lambda free=free: free)
        caplog.clear()
        with caplog.at_level(logging.INFO, "paceline"), pytest.raises(KeyboardInterrupt):
            train(options("shapes", tmp_path, **flat), [StopAtTheStart()])
        (said,) = (line for line in caplog.messages if "chosen in" in line)
        limits[free] = (int(said.removeprefix("batch=").split(",")[0]), said)
    assert limits[8 * GB][0] >= 16
    assert 1 <= limits[GB // 8][0] < 16
    assert "more would not fit" in limits[GB // 8][1]


def test_searches_and_stages_refuse_it(squares: Path, tmp_path: Path) -> None:
    flat = {"data": str(squares), "batch": "auto", "project": str(tmp_path), "device": "cpu", "trials": 2}
    with pytest.raises(UserError, match="give the number that it says"):
        tune(TuneOptions.from_flat(flat), lambda row: None)
    stages = options(squares, tmp_path, parallel="pipeline")
    with pytest.raises(UserError, match="batch=auto measures the whole network on one device, which stages are not"):
        check_layout(stages, 2)
    check_layout(options(squares, tmp_path), 3)
    check_layout(options(squares, tmp_path, parallel="fsdp"), 2)


@pytest.mark.parametrize(
    ("images", "nbs", "expected"), [(12, 64, 12), (12, 8, 8), (768, 64, 64), (4096, 64, 128), (118_000, 64, 3687)]
)
def test_the_set_bounds_the_batch(images: int, nbs: int, expected: int) -> None:
    assert most_images(images, nbs) == expected


@pytest.fixture
def index(squares: Path) -> Index:
    found = open_data_set(DataConfig(data=str(squares)), seed=0).train
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("flat", "together"),
    [
        ({"mosaic": 0.0}, 1),
        ({}, 4),
        ({"mixup": 0.1}, 8),
        ({"cutmix": 0.1, "mosaic": 0.0}, 2),
        ({"copy_paste": 0.5}, 5),
    ],
)
def test_the_densest_batch(index: Index, flat: dict[str, float], together: int) -> None:
    """The fullest images have two boxes."""
    batch = densest_batch(index, AugmentConfig(**flat), 30, 96)
    assert batch.size_hw == (96, 96)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.boxes.shape == (30, 32, 4)
    counts = batch.valid.sum(1)
    assert counts.max() == 2 * together
    assert (counts == 2 * together).sum() == 4 + 4 + 4  # of twelve images four have two; the fullest come first
    boxes = batch.boxes[batch.valid]
    assert (boxes >= 0).all()
    assert (boxes <= 96).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert not batch.boxes[~batch.valid].any()
    assert batch.labels.max() < len(index.names)


def test_the_densest_batch_of_a_set_without_boxes(index: Index) -> None:
    counts = np.diff(index.offsets)
    empty = index.select_images(np.flatnonzero(counts == 0))
    batch = densest_batch(empty, None, 3, 64)
    assert not batch.valid.any()
    assert batch.boxes.shape == (3, 32, 4)


class Held:
    """A device that holds 2 GB and has 10 GB free."""

    def held_bytes(self) -> int:
        return 2 * GB

    def free_bytes(self) -> int:
        return 10 * GB

    def of(self, work: Callable[[], None]) -> int:
        raise AssertionError("nothing is tried here")


def fitting(index: Index, device: str, **data: object) -> FittingBatch:
    config = TrainOptions.from_flat({"imgsz": 64} | data).data
    return FittingBatch(
        cast=None,  # type: ignore[arg-type]
        precision=Precision(name="fp32"),
        data=config,
        augment=AugmentConfig(),
        train_index=index,
        val_index=index,
        device=torch.device(device),
        rank=Rank(),
        nbs=64,
    )


DECODED = 12 * 3 * 64 * 80
"""Bytes of the images of the fixture; as many again for the evaluation, which here has the same."""


@pytest.mark.parametrize(
    ("device", "cache", "set_aside"),
    [
        ("cpu", "none", 0),
        ("cpu", "disk", 0),
        ("cpu", "ram", 2 * DECODED),
        ("cpu", "auto", 2 * DECODED),
        ("cuda", "auto", 0),
        ("cuda", "ram", 0),
        ("cuda", "device", DECODED),
    ],
)
@pytest.mark.parametrize("sharers", [1, 2])
def test_images_that_are_kept_beside_the_network_are_set_aside(
    index: Index, device: str, cache: str, set_aside: int, sharers: int
) -> None:
    found = fitting(index, device, batch=0.5, cache=cache)._room_bytes(Held(), 10 * GB, sharers)
    assert found == 2 * GB + int(0.5 * (10 * GB - set_aside) / sharers)


def test_a_cache_that_chooses_for_itself_leaves_some(index: Index) -> None:
    """It would not keep in memory what takes so much of it."""
    held = fitting(index, "cpu", cache="auto")._room_bytes(Held(), DECODED, 1)
    assert held == 2 * GB + int(0.8 * (DECODED - int(0.75 * DECODED)))
    assert fitting(index, "cpu", cache="ram")._room_bytes(Held(), DECODED, 1) == 2 * GB


def test_loaders_hold_batches_in_the_memory_of_the_host(index: Index) -> None:
    meters = [fitting(index, device)._meter(Held()) for device in ("cpu", "cuda")]
    assert [meter.further_bytes for meter in meters] == [10 * 3 * 64 * 64, 0]
    assert meters[0].training(3).size_hw == meters[0].evaluation(3).size_hw == (64, 64)


def test_the_sentence_of_the_choice() -> None:
    trials = tuple(Trial(images=n, peak_bytes=(1 + n // 4) * GB, seconds=n / 200) for n in (16, 32, 48))
    choice = Choice(images=48, trials=trials, line=None, limit="speed")
    assert describe(choice, 24 * GB, 1, seconds=7) == (
        "batch=48, chosen in 7 s: 13.0 GB of the 24.0 GB that a device may take, 200 images/s, no faster beyond "
        "(of one device, 16: 5.0 GB, 200 images/s; 32: 9.0 GB, 200 images/s)."
    )
    assert describe(choice, 24 * GB, 2, seconds=7).startswith("batch=96 (48 on each of 2 devices), chosen in 7 s:")


# running out of memory


def exhaustion(*, batch: int = 16, unit: int = 1, world: int = 1, line: Line | None = None) -> Exhaustion:
    fitted = None if line is None else Fitted(batch=batch, line=line, room_bytes=20 * GB)
    return Exhaustion(
        batch=batch, unit=unit, device=CPU, rank=Rank(rank=world - 1, world=world, host="here"), fitted=fitted
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"batch": 16}, "The run needs more than the memory of this machine for batch=16; take batch=8, half of it"),
        ({"batch": 18, "unit": 4, "world": 4}, "Rank 3 on here needs more .* take batch=8, half of it"),
        ({"batch": 4, "unit": 4, "world": 4}, "for batch=4, and 4 is the least here; take a smaller imgsz or model"),
        ({"line": Line(fixed_bytes=2 * GB, image_bytes=2 * GB)}, "take batch=8, which should fit by what was measured"),
        (
            {"batch": 64, "unit": 4, "world": 2, "line": Line(fixed_bytes=GB, image_bytes=GB)},
            "take batch=32, which should fit",  # 17 on each of two, and a multiple of 4
        ),
        ({"line": Line(fixed_bytes=0, image_bytes=1)}, "take batch=15, which should fit"),
    ],
)
def test_the_sentence_names_a_batch(given: dict[str, object], sentence: str) -> None:
    with (
        pytest.raises(UserError, match=sentence),
        exhaustion(**given).explained(0, lambda: False),  # type: ignore[arg-type]
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), KeyboardInterrupt(), UserError("x")], ids=repr)
def test_other_failures_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, exhaustion().explained(0, lambda: True):
        raise error
    assert caught.value is error


def test_images_that_fit_by_the_peak() -> None:
    # 2 GB are held, 16 images took 18 GB of 20 GB: 1 GB each, as far as anyone could see; the failed step took more.
    assert fitting_images(16, 2 * GB, 18 * GB, 20 * GB) == 14
    # another process came: 10 GB are left
    assert fitting_images(16, 2 * GB, 18 * GB, 10 * GB) == 7
    assert fitting_images(16, 2 * GB, 18 * GB, 2 * GB) == 0
    assert fitting_images(16, 2 * GB, 2 * GB, 20 * GB) is None


def test_one_process_goes_on_in_micro_batches(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The loss has room for two images; the run comes to its end, and has said what to set."""
    inner = DetectionLoss.__call__

    def narrow(self: DetectionLoss, predictions: tuple[torch.Tensor, ...], batch: object) -> object:
        if len(predictions[0]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")
        return inner(self, predictions, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(DetectionLoss, "__call__", narrow)
    with caplog.at_level(logging.WARNING, "paceline"):
        result = train(options(squares, tmp_path, batch=4, epochs=2))
    assert result.end.epochs == 2
    (said,) = (line for line in caplog.messages if line.startswith("Out of memory"))
    assert "set batch=2 (and nbs to 4 or more" in said
    losses = [line["loss"] for line in result.folder.records("epoch")]
    assert all(np.isfinite(value) for loss in losses for value in loss.values())


def test_an_evaluation_without_room_is_explained(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("paceline.commands.evaluation.evaluate_network", fail)
    with pytest.raises(UserError, match="for batch=4; take batch=2, half of it"):
        train(options(squares, tmp_path, batch=4))


SCRIPT = """
    import sys
    import torch
    from paceline.commands.train import train
    from paceline.errors import UserError
    from paceline.losses.detection import DetectionLoss
    from paceline.options import TrainOptions
    from paceline.parallel.fault import RankError
    from paceline.parallel.launch import launch

    FLAT = dict(data={data!r}, project={project!r}, model="yolo11n", imgsz=64, batch=8, nbs=8, amp="off", plots=False,
                workers=1, device="cpu", devices=2, epochs=3, name="job")

    def work(rank_of):
        inner, calls = DetectionLoss.__call__, []

        def narrow(self, predictions, batch):
            calls.append(1)
            if rank_of() == 1 and len(calls) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")
            return inner(self, predictions, batch)

        DetectionLoss.__call__ = narrow
        train(TrainOptions.from_flat(FLAT))

    def rank():
        import os
        return int(os.environ["RANK"])

    try:
        launch(2, work, rank)
    except (RankError, UserError) as error:
        print(f"{{type(error).__name__}}: {{error}}")
        sys.exit(1)
"""


def test_several_ranks_end_with_one_sentence(squares: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(data=str(squares), project=str(tmp_path / "runs")))
    run = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 1, run.stderr
    assert run.stdout == (
        f"UserError: Rank 1 on {os.uname().nodename} needs more than the memory of this machine for batch=8; take "
        "batch=4, half of it: below nbs, gradients add up to the same update.\n"
    )
    assert "Traceback" not in run.stderr


@pytest.mark.slow
def test_ranks_agree_on_the_measured_batch(squares: Path, tmp_path: Path) -> None:
    words = ["imgsz=64", "batch=auto", "nbs=8", "amp=off", "plots=false", "workers=1", "device=cpu", "devices=2"]
    command = [sys.executable, "-m", "paceline", "train", f"data={squares}", f"project={tmp_path}", "epochs=1", *words]
    run = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (run.stdout + run.stderr).count("batch=8 (4 on each of 2 devices), chosen in") == 1
    assert yaml.safe_load((tmp_path / "train/config.yaml").read_text())["batch"] == 8
