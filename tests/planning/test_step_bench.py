"""`bench/step/run.py`: entries are repeated, what is done is kept, and no size is begun too late."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from bench_records import record

from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set
from paceline.planning.record import FORMAT_VERSION
from paceline.records import to_jsonable

if TYPE_CHECKING:
    from types import ModuleType

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "step" / "run.py"


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(SCRIPT.parent), *sys.path])
    spec = importlib.util.spec_from_file_location("step_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    machine = record().machine
    machine.versions["CUDA"] = "12.8"
    monkeypatch.setattr(module, "here", lambda device: {"device": machine.device, "versions": machine.versions})
    return module


def found(model: str, **options: object) -> dict[str, Any]:
    whole = record(model=model)
    whole.machine.versions["CUDA"] = "12.8"
    whole = replace(whole, options=whole.options | {"model": model, "imgsz": 640, "batch": 64} | options)
    content: dict[str, Any] = {"kind": "bench", "version": FORMAT_VERSION} | to_jsonable(whole)
    return content


class _Measured:
    """Stands for the process that measures: takes its time by a clock that it moves, or fails."""

    def __init__(self, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *, seconds: float) -> None:
        self.models: list[str] = []
        self.fails: set[str] = set()
        self.seconds = seconds
        self.now = 0.0
        monkeypatch.setattr(bench, "measure", self)
        monkeypatch.setattr(bench.time, "monotonic", lambda: self.now)

    def __call__(self, words: list[str], limit_s: float) -> dict[str, Any] | None:
        model = words[0].removeprefix("model=")
        self.models.append(model)
        self.now += self.seconds
        numbers = {
            name: int(value) for name, _, value in (w.partition("=") for w in words) if name in ("imgsz", "batch")
        }
        return None if model in self.fails else found(model, **numbers)


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    bench.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_what_is_done_is_kept_and_passed_over(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured, out = _Measured(bench, monkeypatch, seconds=100.0), str(tmp_path / "results" / "step.json")
    last = run(bench, monkeypatch, capsys, "--models", "n", "s", "--out", out)
    assert measured.models == ["yolo11n", "yolo11s"]
    assert set(last["models"]) == {"yolo11n", "yolo11s"}
    assert last["left"] == []
    measured.now = 0.0
    last = run(bench, monkeypatch, capsys, "--models", "n", "s", "m", "--out", out)
    assert measured.models == ["yolo11n", "yolo11s", "yolo11m"]
    assert set(last["models"]) == {"yolo11n", "yolo11s", "yolo11m"}
    run(bench, monkeypatch, capsys, "--models", "n", "--batch", "8", "--out", out)
    assert measured.models[-1] == "yolo11n"  # another batch is another result


def test_no_size_is_begun_that_may_not_end_in_time(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured, out = _Measured(bench, monkeypatch, seconds=200.0), str(tmp_path / "step.json")
    last = run(bench, monkeypatch, capsys, "--limit", "540", "--out", out)
    assert measured.models == ["yolo11n", "yolo11s"]
    assert measured.now <= 540
    assert last["left"] == ["yolo11m", "yolo11l", "yolo11x"]
    for _ in range(2):
        measured.now = 0.0
        last = run(bench, monkeypatch, capsys, "--limit", "540", "--out", out)
    assert last["left"] == []
    assert set(last["models"]) == {f"yolo11{size}" for size in "nsmlx"}


def test_a_size_that_fails_leaves_the_others(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    measured = _Measured(bench, monkeypatch, seconds=1.0)
    measured.fails = {"yolo11s"}
    last = run(bench, monkeypatch, capsys, "--models", "n", "s", "m", "--out", str(tmp_path / "step.json"))
    assert last["left"] == ["yolo11s"]
    assert set(last["models"]) == {"yolo11n", "yolo11m"}


def test_an_older_result_of_the_same_key_is_replaced(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    bench.merge(out, found("yolo11n"))
    bench.merge(out, found("yolo11s"))
    newer = found("yolo11n") | {"wall_s": 1.5}
    bench.merge(out, newer)
    records = bench.read_results(out)
    assert [entry["model"] for entry in records] == ["yolo11n", "yolo11s"]
    assert records[0] == newer
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_a_bench_that_fails_or_takes_too_long_keeps_nothing(
    bench: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.measure(["model=yolo99"], 100.0) is None
    assert "ended with status 2" in capsys.readouterr().out
    assert bench.measure(["model=yolo11n"], 0.01) is None
    assert "not done in 0 s" in capsys.readouterr().out


def test_repeated_entries_are_the_images_again_and_again(bench: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "set"
    (source / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(3):
        cv2.imwrite(str(source / "images" / f"{number}.jpg"), np.full((32, 48, 3), 80 * number, np.uint8))
        images.append({"id": 10 + number, "file_name": f"{number}.jpg", "width": 48, "height": 32})
        for box in range(number):  # the first image has none
            corners = {"bbox": [box, 2, 10, 11], "area": 110, "iscrowd": 0}
            annotations.append({"id": len(annotations), "image_id": 10 + number, "category_id": 1, **corners})
    whole = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (source / "instances.json").write_text(json.dumps(whole))
    folder = bench.repeated(source, 30, tmp_path / "work")
    assert bench.repeated(source, 30, tmp_path / "work") == folder
    data = open_data_set(DataConfig(data=str(folder)), seed=0)
    assert data.train is not None
    assert data.val is not None
    assert len(data.train) + len(data.val) == 30
    boxes = sorted(count for index in (data.train, data.val) for count in np.diff(index.offsets).tolist())
    assert boxes == [0] * 10 + [1] * 10 + [2] * 10
