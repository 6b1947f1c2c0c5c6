"""The run folder and its records."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.errors import UserError
from paceline.records import EndRecord, LossRecord, RunFolder, joined_epochs, to_jsonable, write_atomically


def test_unnamed_runs_count_up(tmp_path: Path) -> None:
    made = [RunFolder.create(tmp_path / "runs", "", exist_ok=False).path.name for _ in range(3)]
    assert made == ["train", "train2", "train3"]
    assert RunFolder.create(tmp_path / "runs", "", exist_ok=False, default_name="val").path.name == "val"


def test_a_named_folder_is_only_used_again_when_asked(tmp_path: Path) -> None:
    first = RunFolder.create(tmp_path, "mine", exist_ok=False)
    assert RunFolder.create(tmp_path, "mine", exist_ok=False).path == first.path  # empty, so nothing is lost
    first.append("epoch", {"epoch": 1})
    with pytest.raises(UserError, match="exists already"):
        RunFolder.create(tmp_path, "mine", exist_ok=False)
    (first.path / "weights").mkdir()
    half = "weights/.best.safetensors.x8_1afgq"  # written by a run that was killed
    for name in ("DONE", "weights/resume.safetensors", "weights/best.json", half, ".notes.markdown", "notes.txt"):
        (first.path / name).write_text("")
    again = RunFolder.create(tmp_path, "mine", exist_ok=True)
    left = {path.name for path in again.path.rglob("*") if path.is_file()}
    assert left == {"notes.txt", ".notes.markdown"}, "nobody goes on from what another run has left"
    assert list(again.records("epoch")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path, "file", exist_ok=True)


@pytest.mark.parametrize("kind", ["val", "predict", "tune"])
def test_nothing_but_a_training_writes_over_a_training(tmp_path: Path, kind: str) -> None:
    run = RunFolder.create(tmp_path, "mine", exist_ok=False)
    run.append("epoch", {"epoch": 1})
    run.weights.mkdir()
    (run.weights / "best.safetensors").touch()
    with pytest.raises(UserError, match="folder of a training"):
        RunFolder.create(tmp_path, "mine", exist_ok=True, default_name=kind)
    assert [entry["epoch"] for entry in run.records("epoch")] == [1]
    assert (run.weights / "best.safetensors").exists()


def test_records_come_back_by_kind_and_a_line_cut_off_is_passed_over(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", exist_ok=False)
    run.append("epoch", {"epoch": 1, "loss": LossRecord(box=1.5, cls=math.nan, dfl=0.25)})
    run.append("end", EndRecord(folder=run.path, reason="finished", epochs=1, best_epoch=1, best=None, wall_s=2.0))
    with run.metrics.open("a") as stream:
        stream.write('{"kind": "epoch", "epo')
    assert [entry["epoch"] for entry in run.records("epoch")] == [1]
    run.append("epoch", {"epoch": 2})
    epochs = list(run.records("epoch"))
    assert [entry["epoch"] for entry in epochs] == [1, 2], "what comes after it is read"
    assert epochs[0]["loss"] == {"box": 1.5, "cls": None, "dfl": 0.25}
    assert next(iter(run.records("end")))["reason"] == "finished"
    assert epochs[0]["version"] == 1


def test_records_are_plain_json() -> None:
    record = EndRecord(folder=Path("a"), reason="x", epochs=1, best_epoch=0, best=None, wall_s=math.inf)
    assert json.loads(json.dumps(to_jsonable(record), allow_nan=False))["wall_s"] is None


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("module", ["paceline", "paceline.records", "paceline.options", "paceline.cli.main"])
def test_what_has_to_start_at_once_does_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def line(kind: str, epoch: int, elapsed_s: float, ap: float | None) -> dict[str, object]:
    evaluation = None if ap is None else {"ap": ap}
    return {"kind": kind, "epoch": epoch, "elapsed_s": elapsed_s, "evaluation": evaluation}


def test_figures_are_found_with_their_epoch_or_in_a_line_of_their_own() -> None:
    lines = [
        line("epoch", 1, 10, None),
        line("evaluation", 1, 14, 0.1),
        line("epoch", 2, 20, None),
        line("epoch", 3, 30, 0.3),
    ]
    epochs = joined_epochs(lines)
    assert [(e["epoch"], e["evaluation"], e.get("evaluated_s")) for e in epochs] == [
        (1, {"ap": 0.1}, 14),
        (2, None, None),
        (3, {"ap": 0.3}, 30),
    ]
    assert [e["kind"] for e in epochs] == ["epoch"] * 3
    assert lines[0]["evaluation"] is None, "what was given stays as it is"


def test_an_epoch_that_was_done_again_counts_once_and_the_last_time() -> None:
    lines = [
        line("epoch", 1, 10, None),
        line("epoch", 2, 20, None),
        line("evaluation", 1, 21, 0.1),
        line("epoch", 2, 25, None),
        line("evaluation", 1, 26, 0.15),
        line("evaluation", 2, 31, 0.2),
    ]
    for given in (lines, lines[:1] + lines[3:]):
        assert [(e["epoch"], e["evaluation"], e["evaluated_s"]) for e in joined_epochs(given)] == [
            (1, {"ap": 0.15}, 26),
            (2, {"ap": 0.2}, 31),
        ]
    assert joined_epochs([line("evaluation", 7, 1, 0.1)]) == [], "of an epoch whose line is missing nothing is known"
