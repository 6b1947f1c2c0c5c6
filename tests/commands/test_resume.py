"""Going on with a run: where it goes on may be said anew, everything else stays."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from paceline.commands.layout import ranks_to_launch
from paceline.commands.resume import going_on, resumed_folder
from paceline.errors import UserError
from paceline.options import TrainOptions, settle_resume
from paceline.records import RunFolder

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was started on two GPUs, with limits of its own."""
    folder = tmp_path / "run"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "resume.safetensors").write_bytes(b"")
    flat = {"device": "2,3", "limit_silence": 120.0, "limit_step": 7.0, "epochs": 9, "parallel": "fsdp", "batch": 8}
    TrainOptions.from_flat(flat).write(folder / "config.yaml")
    return folder


def resumed(run: Path, **said: object) -> TrainOptions:
    folder, options = going_on(TrainOptions.from_flat(settle_resume({"resume": str(run)} | said)))
    assert folder is not None
    assert folder.path == run
    assert options.loop.epochs == 9
    assert options.data.batch == 8
    assert options.loop.resume == ""
    return options


def test_what_is_not_said_stays(run: Path) -> None:
    options = resumed(run)
    assert options.loop.device == "2,3"
    assert (options.limits.limit_silence, options.limits.limit_step) == (120.0, 7.0)
    assert options.parallel.parallel == "fsdp"
    assert ranks_to_launch(TrainOptions.from_flat({"resume": str(run)})) == 2


@pytest.mark.parametrize(
    ("inside", "named"),
    [
        ("", "weights/last.safetensors"),
        ("weights", "last.safetensors"),
        ("..", "run/weights/best.safetensors"),
        ("..", "run/weights/last.pt"),
        ("..", "run/weights"),
    ],
)
def test_a_file_in_the_weights_names_its_run_from_anywhere(
    run: Path, monkeypatch: pytest.MonkeyPatch, inside: str, named: str
) -> None:
    monkeypatch.chdir((run / inside).resolve())
    folder = resumed_folder(TrainOptions.from_flat({"resume": named}))
    assert folder is not None
    assert folder.path.resolve() == run.resolve()


def test_a_run_that_is_named_as_the_model_goes_on_not_the_newest(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = run.parent / "newer" / "weights"
    newer.mkdir(parents=True)
    (newer / "resume.safetensors").write_bytes(b"")
    os.utime(run / "weights" / "resume.safetensors", (1, 1))
    monkeypatch.chdir(run.parent)
    for model in ("run", "./run", str(run), "run/weights/last.safetensors"):
        folder = resumed_folder(TrainOptions.from_flat(settle_resume({"resume": True, "model": model, "project": "."})))
        assert folder is not None
        assert folder.path.resolve() == run.resolve(), model
    for model, sentence in (("runs/detect/train/weights/last.pt", "of another trainer"), ("nix/run", "holds no")):
        with pytest.raises(UserError, match=sentence):
            resumed_folder(TrainOptions.from_flat(settle_resume({"resume": True, "model": model, "project": "."})))


def test_data_that_were_named_from_another_folder_are_found(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TrainOptions.from_flat({"data": "pets/data.yaml", "epochs": 9, "batch": 8}).write(run / "config.yaml")
    pets = run.parent / "pets"
    pets.mkdir()
    (pets / "data.yaml").write_text("names: [cat]")
    RunFolder(path=run).append("run", {"data": str(pets / "data.yaml")})
    monkeypatch.chdir(run)
    assert resumed(run).data.data == str(pets / "data.yaml")
    monkeypatch.chdir(run.parent)
    assert resumed(run).data.data == "pets/data.yaml"
    other = run.parent / "other"
    (other / "pets").mkdir(parents=True)
    (other / "pets" / "data.yaml").write_text("names: [dog]")
    monkeypatch.chdir(other)
    assert resumed(run).data.data == str(pets / "data.yaml"), "another set of that name is not what it was trained on"
    (pets / "data.yaml").unlink()
    monkeypatch.chdir(run.parent)
    with pytest.raises(UserError, match=r"pets/data\.yaml, are not there"):
        resumed(run)


def test_devices_layout_and_limits_may_be_said_anew(run: Path) -> None:
    options = resumed(run, device="cpu", devices=4, limit_step=9)
    assert (options.loop.device, options.ranks.devices) == ("cpu", 4)
    assert (options.limits.limit_silence, options.limits.limit_step) == (120.0, 9.0)
    assert options.parallel.parallel == "fsdp"
    words = {"resume": str(run), "device": "cpu", "devices": 2, "parallel": "pipeline"}
    assert ranks_to_launch(TrainOptions.from_flat(settle_resume(words))) == 2
    assert resumed(run, devices=3).loop.device == "auto"  # the two GPUs of then are not three


def test_a_batch_that_other_devices_cannot_share_is_no_advice_to_change_it(run: Path) -> None:
    words = {"resume": str(run), "device": "cpu", "devices": 3}
    with pytest.raises(UserError, match="keeps its batch, so take another number of devices"):
        ranks_to_launch(TrainOptions.from_flat(settle_resume(words)))
    words |= {"parallel": "pipeline", "stages": 2}
    with pytest.raises(UserError) as found:
        ranks_to_launch(TrainOptions.from_flat(settle_resume(words)))
    assert "keeps its batch" not in str(found.value), "what is wrong is the number of stages"


def test_a_run_goes_on_where_its_data_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path is kept as it was given, relative to the folder that the run was started in."""
    TrainOptions.from_flat({"data": "set/data.yaml", "epochs": 9, "batch": 8}).write(run / "config.yaml")
    with pytest.raises(UserError, match=r"set/data\.yaml, are not there; go on from the folder that it was started in"):
        resumed(run)
    (run.parent / "set").mkdir()
    (run.parent / "set" / "data.yaml").touch()
    monkeypatch.chdir(run.parent)
    assert resumed(run).data.data == "set/data.yaml"


def test_processes_that_others_have_started_are_as_many_as_they_are(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = {"device": "cpu", "devices": 2, "epochs": 9, "batch": 8}
    TrainOptions.from_flat(flat).write(run / "config.yaml")
    assert resumed(run).ranks.devices == 2
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    options = resumed(run)
    assert (options.loop.device, options.ranks.devices) == ("cpu", 0)


@pytest.mark.parametrize("named", ["run", "run/weights/last.safetensors", "true"])
def test_a_run_that_is_done_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.chdir(run.parent)
    RunFolder(path=run).mark("DONE")
    options = TrainOptions.from_flat({"resume": named, "project": "."})
    with pytest.raises(UserError, match=r"is done, so nothing is left .* by model=.*run\."):
        resumed_folder(options)


def test_a_name_that_is_taken_is_refused_before_any_process_is_started(run: Path) -> None:
    flat = {"project": str(run.parent), "name": run.name, "device": "cpu", "devices": 2}
    with pytest.raises(UserError, match="exists already; choose another name"):
        ranks_to_launch(TrainOptions.from_flat(flat))
    assert ranks_to_launch(TrainOptions.from_flat(flat | {"exist_ok": True})) == 2
    assert ranks_to_launch(TrainOptions.from_flat(flat | {"name": "free"})) == 2
    assert not (run.parent / "free").exists()
