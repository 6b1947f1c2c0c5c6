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
from paceline.records import EndRecord, LossRecord, RunFolder, to_jsonable, write_atomically


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
    again = RunFolder.create(tmp_path, "mine", exist_ok=True)
    assert list(again.records("epoch")) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        RunFolder.create(tmp_path, "file", exist_ok=True)


def test_records_come_back_by_kind_and_a_line_cut_off_is_passed_over(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run", exist_ok=False)
    run.append("epoch", {"epoch": 1, "loss": LossRecord(box=1.5, cls=math.nan, dfl=0.25)})
    run.append("end", EndRecord(folder=run.path, reason="finished", epochs=1, best_epoch=1, best=None, wall_s=2.0))
    with run.metrics.open("a") as stream:
        stream.write('{"kind": "epoch", "epo')
    epochs = list(run.records("epoch"))
    assert [entry["epoch"] for entry in epochs] == [1]
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
