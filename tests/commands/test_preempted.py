"""A run that is asked to stop leaves a mark, and the same command goes on with it."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from paceline.callbacks import Callback
from paceline.commands.train import train
from paceline.errors import UserError
from paceline.options import TrainOptions, settle_resume

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.records import StepRecord


class Scheduler(Callback):
    """Sends this process a signal in the middle of an epoch."""

    def __init__(self, number: signal.Signals, epoch: int) -> None:
        self._number = number
        self._epoch = epoch

    def on_step(self, record: StepRecord) -> None:
        if (record.epoch, record.step) == (self._epoch, 2):
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize(
    ("number", "epoch"), [(signal.SIGTERM, 2), pytest.param(signal.SIGUSR1, 1, marks=pytest.mark.slow)]
)
def test_the_same_command_goes_on_with_a_preempted_run(
    squares: Path, tmp_path: Path, number: signal.Signals, epoch: int, caplog: pytest.LogCaptureFixture
) -> None:
    flat: dict[str, object] = {
        "data": str(squares), "imgsz": 64, "batch": 4, "epochs": 2, "nbs": 8, "workers": 1, "amp": "off",
        "device": "cpu", "plots": False, "project": str(tmp_path), "name": "job", "resume": "auto",
    }  # fmt: skip
    options = TrainOptions.from_flat(settle_resume(flat))
    whole = train(TrainOptions.from_flat(flat | {"name": "whole", "resume": ""}))
    before = signal.getsignal(number)
    cut = train(options, [Scheduler(number, epoch)])
    assert signal.getsignal(number) == before
    assert (cut.end.reason, cut.end.epochs) == ("preempted", epoch - 1)
    folder = tmp_path / "job"
    assert {path.name for path in folder.iterdir()} & {"DONE", "PREEMPTED"} == {"PREEMPTED"}
    again = train(options)
    assert again.end.reason == "finished"
    assert {path.name for path in folder.iterdir()} & {"DONE", "PREEMPTED"} == {"DONE"}
    assert not caplog.messages or not any("goes on with the options" in message for message in caplog.messages)
    expected = load_file(whole.folder.weights / "last.safetensors")
    found = load_file(folder / "weights" / "last.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    with pytest.raises(UserError, match="is done; choose another name"):
        train(options)


def test_resume_auto_needs_a_name(squares: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs the name"):
        train(TrainOptions.from_flat({"data": str(squares), "project": str(tmp_path), "resume": "auto"}))
    assert list(tmp_path.iterdir()) == []
