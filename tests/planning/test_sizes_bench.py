"""`bench/vs_peers/sizes.py`: what counts, whose clock it is, and that nothing that was done is lost."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import psutil
import pytest

from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set

if TYPE_CHECKING:
    from types import ModuleType

BENCH = Path(__file__).resolve().parents[2] / "bench"
VERSIONS = {"ultralytics": "8", "torch": "2", "torchvision": "0"}
H200 = {"device": "NVIDIA H200", "versions": {"torch": "2.11", "CUDA": "13.0"}}
STUB = """\
#!{python}
import json, subprocess, sys, time
from pathlib import Path

if sys.argv[1] == "-c":
    print(json.dumps({{"versions": {versions}, "writes": {writes}}}))
    sys.exit()
sys.path.insert(0, {peer!r})
from events import Events
out = Path(next(word for word in sys.argv if "runs" in word))
print(" ".join(sys.argv))
events = Events(out / "events.jsonl")
{body}
"""
EPOCHS = """
for epoch in range(1, {epochs} + 1):
    for step in range(4):
        time.sleep(0.01)
        events.step()
    events.trained()
    if epoch == {dies_in}:
        sys.exit("polars is not there")
    events.epoch(epoch, None)
"""
STUCK = """
for step in range(4):
    time.sleep(0.01)
    events.step()
events.trained()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
Path(out / "child").write_text(str(child.pid))
child.wait()
"""


@pytest.fixture(name="bench")
def _bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(BENCH / "vs_peers"), *sys.path])
    spec = importlib.util.spec_from_file_location("sizes_bench", BENCH / "vs_peers" / "sizes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # where dataclasses look
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "here", lambda device: H200)
    return module


@pytest.fixture(name="source")
def _source(tmp_path: Path) -> Path:
    """Two images of COCO: one with two boxes and a crowd, one with none."""
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True)
    for number in range(2):
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), np.full((32, 48, 3), 80 * number, np.uint8))
    images = [{"id": 7 + number, "file_name": f"{number}.jpg", "width": 48, "height": 32} for number in range(2)]
    boxes = [([3, 2, 10, 11], 9, 0), ([20, 5, 16, 8], 4, 0), ([0, 0, 40, 30], 4, 1)]
    annotations = [
        {"id": number, "image_id": 7, "category_id": category, "bbox": box, "area": 110, "iscrowd": crowd}
        for number, (box, category, crowd) in enumerate(boxes)
    ]
    categories = [{"id": 9, "name": "a: thing"}, {"id": 4, "name": "other"}]
    whole = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(whole))
    return folder


def stub(path: Path, body: str, *, writes: bool = True, **numbers: int) -> Path:
    """An interpreter that trains nothing, tells of it, and says which versions it has."""
    code = STUB.format(
        python=sys.executable,
        versions=VERSIONS,
        writes=writes,
        peer=str(BENCH / "peer"),
        body=body.format(**numbers) if numbers else body,
    )
    path.write_text(code)
    path.chmod(0o755)
    return path


class _Run:
    """Calls the bench, ours being a stub as well."""

    def __init__(self, bench: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, source: Path) -> None:
        self.bench, self.monkeypatch, self.folder, self.source = bench, monkeypatch, folder, source
        self.out = folder / "sizes.json"
        self.ours = stub(folder / "ours", EPOCHS, epochs=9, dies_in=0)

    def __call__(self, peer: Path, capsys: pytest.CaptureFixture[str], *words: str) -> Any:
        def command(task: object, out: Path, *options: str) -> list[str]:
            return [str(self.ours), "script", "data", str(out), *options]

        self.monkeypatch.setattr(self.bench.Task, "ours", command)
        fixed = ["--data", self.source, "--entries", "8", "--batch", "2", "--work", self.folder / "work"]
        fixed += ["--out", self.out, "--peer-python", peer, "--models", "n", "--seconds", "0"]
        self.monkeypatch.setattr(sys, "argv", ["sizes.py", *map(str, fixed), *words])
        self.bench.main()
        self.printed = capsys.readouterr().out
        return json.loads(self.printed.splitlines()[-1])

    def runs(self) -> dict[str, Any]:
        (record,) = json.loads(self.out.read_text())["records"]
        found: dict[str, Any] = record["runs"]
        return found


@pytest.fixture(name="run")
def _run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Path) -> _Run:
    return _Run(bench, monkeypatch, tmp_path, source)


def told(*, epochs: int, steps: int = 4, step_s: float = 2.0, save_s: float = 1.0) -> list[dict[str, Any]]:
    """Events of a training whose host is told at once, and whose device takes `step_s` for each step."""
    events: list[dict[str, Any]] = []
    now, number = 50.0, 0
    for epoch in range(1, epochs + 1):
        begin = now
        for step in range(1, steps + 1):
            number += 1
            waits = epoch == 1 and number & (number - 1) == 0
            time_s = now + step * step_s if waits else begin + 0.001 * step
            events.append({"kind": "step", "time": time_s, "standin_s": 0.0} | ({"settled": True} if waits else {}))
        now += steps * step_s
        events.append({"kind": "trained", "time": now, "standin_s": 0.0, "settled": True})
        now += save_s
        events.append({"kind": "epoch", "epoch": epoch, "time": now, "standin_s": 0.0, "settled": True})
    return events


def test_whole_epochs_count_after_the_first(bench: ModuleType) -> None:
    found = bench.figures(told(epochs=4), images=64, batch=16)
    assert found["images_per_s"] == pytest.approx(64 / 9)  # four steps of 2 s and what is saved
    assert (found["epochs"], found["within_first_epoch"], found["start_s"]) == (3, False, 52.0)
    events = told(epochs=4)
    for number, event in enumerate(events):  # a first epoch of any length changes nothing
        event["time"] += 100.0 if number >= 4 else 0.0
    assert bench.figures(events, images=64, batch=16)["images_per_s"] == found["images_per_s"]


def test_the_stand_ins_seconds_are_taken_off(bench: ModuleType) -> None:
    plain = bench.figures(told(epochs=3), images=64, batch=16)
    events = told(epochs=3)
    for number, event in enumerate(events):
        event["time"] += 0.5 * number
        event["standin_s"] += 0.5 * number
    found = bench.figures(events, images=64, batch=16)
    assert found["images_per_s"] == pytest.approx(plain["images_per_s"])
    assert found["standin_s"] == pytest.approx(0.5 * 12)


def test_within_an_epoch_the_clock_is_the_devices(bench: ModuleType) -> None:
    events = told(epochs=1, steps=20)[:-1]  # ended before its first epoch did, when it was to be saved
    found = bench.figures(events, images=320, batch=16)
    assert found["images_per_s"] == pytest.approx(16 / 2.0)
    assert (found["within_first_epoch"], found["steps"]) == (True, 16)  # from step 4, a fifth of the way
    cut = bench.figures(events[:17], images=320, batch=16)  # the last that waited is step 16
    assert (cut["steps"], cut["images_per_s"]) == (12, pytest.approx(16 / 2.0))
    assert bench.figures(events[:1], images=320, batch=16) is None
    assert bench.figures([], images=320, batch=16) is None


def test_only_the_first_epochs_steps_wait(bench: ModuleType, tmp_path: Path) -> None:
    stub(tmp_path / "stub", EPOCHS, epochs=2, dies_in=0)
    contender = bench.Contender([str(tmp_path / "stub"), "script", str(tmp_path / "runs")], tmp_path / "runs")
    assert contender.go_to(lambda events: False, 30.0) == "ended with status 0"
    assert [event["kind"] for event in contender.events] == [*["step"] * 4, "trained", "epoch"] * 2
    waited = [event.get("settled", False) for event in contender.events]
    assert waited == [True, True, False, True, True, True, False, False, False, False, True, True]


def test_who_is_held_goes_on_where_it_was(bench: ModuleType, tmp_path: Path) -> None:
    stub(tmp_path / "stub", EPOCHS, epochs=3, dies_in=0)
    contender = bench.Contender([str(tmp_path / "stub"), "script", str(tmp_path / "runs")], tmp_path / "runs")
    contender.go_on(1)
    held_at_s, epochs = contender.active_s, contender.epochs
    assert epochs >= 1
    contender.go_on()
    assert (contender.epochs, contender.status) == (3, 0)
    times = [event["time"] for event in contender.events]
    assert times == sorted(times)
    assert times[-1] <= contender.active_s
    assert contender.active_s > held_at_s


def test_both_train_and_the_ratio_is_kept(run: _Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    peer = stub(tmp_path / "peer", EPOCHS.replace("0.01", "0.05"), epochs=9, dies_in=0)
    last = run(peer, capsys)
    row = last["models"]["yolo11n"]
    assert last["left"] == []
    assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=0.01)
    assert 1.5 < row["ratio"] < 20
    assert run.runs()["ours"]["ended"] == run.runs()["theirs"]["ended"] == "enough"
    assert run.runs()["theirs"]["epochs"] >= 2
    assert {"cache=ram", "val=False", "device=0"} <= set(run.runs()["theirs"]["options"])
    assert "save=False" not in run.runs()["theirs"]["options"]
    again = run(peer, capsys)
    assert again == last
    assert "yolo11n, ours: done before." in run.printed


def test_a_reference_that_ends_after_its_first_epoch_has_a_figure(
    run: _Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    peer = stub(tmp_path / "peer", EPOCHS, epochs=9, dies_in=1)
    last = run(peer, capsys)
    theirs = run.runs()["theirs"]
    assert (theirs["within_first_epoch"], theirs["ended"]) == (True, "ended with status 1")
    assert last["models"]["yolo11n"]["within_first_epoch"] == ["theirs"]
    assert last["models"]["yolo11n"]["ratio"] > 0
    assert "polars is not there" in run.printed
    run(peer, capsys)  # it would end there again
    assert "yolo11n, theirs: done before." in run.printed


def test_where_a_save_would_end_it_the_reference_saves_nothing(
    run: _Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(stub(tmp_path / "peer", EPOCHS, writes=False, epochs=4, dies_in=0), capsys)
    assert "save=False" in run.runs()["theirs"]["options"]


def test_what_is_cut_off_is_kept_and_done_again(run: _Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run.bench.EXPECTED_S[run.bench.THEIRS] = 0.1
    begun = time.monotonic()
    last = run(stub(tmp_path / "peer", STUCK), capsys, "--limit", "5")
    assert time.monotonic() - begun < 20
    assert last["left"] == ["yolo11n, theirs"]
    assert run.runs()["theirs"]["ended"] == "cut off"
    child = int((tmp_path / "work" / "runs" / "yolo11n-theirs" / "child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE
    last = run(stub(tmp_path / "peer", EPOCHS, epochs=4, dies_in=0), capsys)
    assert last["left"] == []
    assert (run.runs()["theirs"]["ended"], run.runs()["theirs"]["epochs"]) == ("enough", 2)


def test_no_training_is_begun_that_may_not_end_in_time(
    run: _Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    now, trained = 0.0, []

    def train(command: list[str], out: Path, arguments: object, limit_s: float) -> dict[str, Any]:
        nonlocal now
        trained.append(out.name)
        now += 100.0
        return {"images_per_s": 1.0, "within_first_epoch": False, "start_s": 1.0, "ended": "enough"}

    monkeypatch.setattr(run.bench, "train", train)
    monkeypatch.setattr(run.bench.time, "monotonic", lambda: now)
    peer = stub(tmp_path / "peer", "")
    words = ("--models", "n", "s", "--peer-try", "compile=True", "--limit", "540")
    last = run(peer, capsys, *words)
    assert now <= 540
    assert len(trained) == 5
    assert last["left"] == ["yolo11s, theirs, compile=True"]
    assert set(run.bench.RATIOS) == {"n", "s", "m", "l", "x"}
    now = 0.0
    assert run(peer, capsys, *words)["left"] == []
    assert trained[-1] == "yolo11s-theirs-compile-True"


def test_what_counts_is_the_best_of_the_reference(bench: ModuleType, tmp_path: Path) -> None:
    def run_of(rate: float) -> dict[str, Any]:
        return {"images_per_s": rate, "within_first_epoch": False, "start_s": 1.0}

    record = {
        "machine": H200,
        "reference": {"versions": VERSIONS},
        "model": "yolo11n",
        "options": {"imgsz": 640, "batch": 64, "entries": 4096},
        "runs": {"ours": run_of(4000.0), "theirs": run_of(700.0), "theirs, compile=True": run_of(800.0)},
    }
    alone = [
        record | {"step": {"images_per_s": {"median": rate}}, "options": {"imgsz": imgsz, "batch": 64}}
        for imgsz, rate in ((640, 5000.0), (320, 9000.0))
    ]
    (tmp_path / "step.json").write_text(json.dumps({"records": alone}))
    row = bench.row_of(record, tmp_path / "step.json")
    assert (row["theirs_is"], row["ratio"], row["of_step"], row["aim"]) == ("theirs, compile=True", 5.0, 0.8, 5.0)
    elsewhere = bench.row_of(record | {"machine": H200 | {"device": "NVIDIA H100"}}, tmp_path / "step.json")
    assert (elsewhere["aim"], elsewhere["of_step"]) == (None, None)
    other = record | {"reference": {"versions": VERSIONS | {"ultralytics": "9"}}}
    for one in (record, other):
        bench.merge(tmp_path / "sizes.json", one, bench.contest_key)
    assert len(bench.read_results(tmp_path / "sizes.json")) == 2  # another reference is another contest


def test_an_interpreter_without_the_reference_is_named(bench: ModuleType, tmp_path: Path) -> None:
    peer = stub(tmp_path / "peer", "")
    peer.write_text(peer.read_text().replace("'ultralytics': '8'", "'ultralytics': ''"))
    with pytest.raises(SystemExit, match=r"peer has no ultralytics.*--peer-python"):
        bench.reference_of(peer)


def test_both_read_the_same_boxes(bench: ModuleType, source: Path, tmp_path: Path) -> None:
    entries = bench.repeated(source, 6, tmp_path / "work")
    data_yaml = bench.coco_to_yolo(entries, source, tmp_path / "yolo")
    ours = open_data_set(DataConfig(data=str(data_yaml)), seed=0)
    assert ours.train is not None
    assert ours.val is not None
    assert (len(ours.train), len(ours.val)) == (6, 2)
    assert ours.names == ("other", "a: thing")  # in the order of COCO's ids
    assert np.diff(ours.train.offsets).tolist() == [2, 0] * 3
    np.testing.assert_allclose(ours.val.boxes, [[3, 2, 13, 13], [20, 5, 36, 13]], atol=1e-3)
    assert ours.val.labels.tolist() == [1, 0]
