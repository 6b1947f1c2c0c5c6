"""The command: statuses, sentences, help and versions, without any training."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

import paceline
import paceline.cli.runs
import paceline.cli.tune
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.main import main
from paceline.models.catalogue import CATALOGUE
from paceline.options import TrainOptions, option_fields

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"], ["detect", "--help"]])
def test_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    text = capsys.readouterr().out
    assert all(
        f"  {command}" in text for command in ("train", "val", "predict", "tune", "models", "data check", "data plot")
    )
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    "command", ["train", "val", "predict", "tune", "bench", "data check", "data plot", "data pack", "data convert"]
)
def test_help_of_a_command_fits_a_narrow_terminal(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"default:\s*(''|\))", text)  # which says nothing
    assert "True" not in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"paceline {paceline.__version__}\n"


def test_help_is_instant() -> None:
    times_s = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "paceline", "--help"], check=True, capture_output=True)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.5


def test_help_of_a_command_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    missing = [name for name in option_fields(TrainOptions) if f"--{name.replace('_', '-')} " not in text]
    assert missing == []


@pytest.mark.parametrize("command", ["train", "val", "predict", "tune", "bench"])
def test_brief_help_is_a_part_of_the_whole(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The most used options, with the same words and defaults, on little more than a screen."""
    assert main([command, "-h"]) == 0
    brief = capsys.readouterr()
    assert main([command, "--help"]) == 0
    whole = capsys.readouterr().out
    assert brief.err == ""
    assert "--help lists all of them" in brief.out
    assert "--help lists all of them" not in whole
    options = {word for word in brief.out.split() if re.fullmatch("--[a-z][a-z0-9-]*", word)}
    assert {"--model", "--device", "--data" if command != "predict" else "--source"} <= options
    assert {word for word in options if word not in whole.split()} == set()
    assert brief.out.count("\n") < min(70, whole.count("\n"))


@pytest.mark.parametrize(
    "words", [["val", "-h"], ["tune", "-h"], ["predict", "-h"], ["data", "check", "-h"], ["data", "plot", "-h"]]
)
def test_other_commands_have_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert f"usage: paceline {' '.join(words[:-1])}" in capsys.readouterr().out


def test_help_may_be_asked_for_before_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help", "val"]) == 0
    first = capsys.readouterr().out
    assert main(["val", "--help"]) == 0
    assert first == capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "did you mean train?"),
        (["zzz"], "choose one of train, val, predict, tune, bench, models, data."),
        (["export"], "export is not there yet"),
        (["settings"], "`--config FILE` reads them from YAML"),
        (["mode=train", "data=shapes"], "without mode=train: write `paceline train"),
        (["train", "set.yaml"], "here data=set.yaml."),
        (["train", "yolo11n.pt"], "here model=yolo11n.pt."),
        (["train", "data", "=", "shapes"], "without blanks around =."),
        (["train", "epochs=", "3"], "without blanks around =."),
        (["train", "data=coco8.yaml"], "data sets are not downloaded"),
        (["train", "data=shapes", "model=yolo26n.pt"], "(model=yolo11n)"),
        (["train", "data=shapes", "model="], "No model is named"),
        (["segment", "train"], "only detection is offered"),
        (["train", "detect", "epochs=0"], "epochs=0 is out of range"),
        (["train", "shapes", "epochs=3"], "here data=shapes."),
        (["train", "resume", "."], "here resume=."),
        (["train", "val_period=5"], "did you mean val_interval?"),
        (["train", "seed=-1"], "at most 4294967295."),
        (["train", "pretrained=yolo11n.pt"], "leave it out to train from scratch"),
        (["imgsz=640"], "Name the command before imgsz=640"),
        (["train", "imgz=640"], "did you mean imgsz?"),
        (["train", "imgsz=500"], "the nearest are 480 and 512."),
        (["detect", "train", "erasing=0.5"], "erasing=0.5 is not taken"),
        (["train", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "resume=true", "epochs=3"], "leave out epochs"),
        (["val"], "val needs weights"),
        (["predict"], "predict needs something to look at"),
        (["predict", "missing.jpg", "model=x"], "There is no file or folder missing.jpg"),
        (["models", "imgsz=3"], "models takes no options"),
        (["data", "chek"], "did you mean check?"),
        (["data", "set.yaml"], "paceline data check set.yaml"),
        (["data", "check"], "needs a data set"),
    ],
)
def test_mistakes_are_one_sentence_and_status_2(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.err.startswith("paceline: ")
    assert sentence in output.err
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err + output.out
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_words: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(paceline.cli.runs, "run_train", interrupted)
    assert main(["train"]) == 130
    assert "paceline train --resume" in capsys.readouterr().err
    monkeypatch.setattr(paceline.cli.tune, "run_tune", interrupted)
    assert main(["tune"]) == 130
    assert "paceline tune --resume" in capsys.readouterr().err
    monkeypatch.setattr(paceline.cli.runs, "run_predict", interrupted)
    assert main(["predict", "train"]) == 130
    assert capsys.readouterr().err == "paceline: interrupted.\n"


def test_letters_that_the_terminal_lacks_do_not_end_a_command() -> None:
    code = (
        "from paceline.cli import main; main.run = lambda words: print('stra\\xdfe.jpg: 1 \\u5b57') or 0; main.main()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (0, b"stra?e.jpg: 1 ?\n"), done.stderr


def test_models_lists_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for info in CATALOGUE:
        row = next(line for line in lines if line.startswith(info.name)).split()
        assert row == [
            info.name,
            f"{info.params:,}",
            f"{info.params_fused:,}",
            str(info.gflops),
            str(info.published_ap),
        ]


def test_messages_go_to_the_error_stream_and_the_handler_goes_again(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("paceline.test")
    parent, root = logging.getLogger("paceline"), logging.getLogger()
    kept, root.handlers = root.handlers, []  # pytest's own
    try:
        with logging_to(ConsoleHandler()):
            logger.info("said")
            logger.warning("warned")
            with logging_to(ConsoleHandler()):
                logger.info("once")
        assert parent.handlers == []
    finally:
        root.handlers = kept
    assert capsys.readouterr().err == "said\nwarning: warned\nonce\n"


def test_who_names_no_data_set_is_told_what_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(paceline.cli.runs, "train_with_progress", lambda options: None)
    config = tmp_path / "config.yaml"
    config.write_text("data: pets.yaml")
    for words in (["data=shapes"], ["--config", str(config)], ["resume=runs/train"]):
        assert main(["train", *words]) == 0
    assert caplog.messages == []
    assert main(["train", "epochs=3"]) == 0
    assert [message.split(",")[0] for message in caplog.messages] == ["No data set is named"]


def test_verbose_false_leaves_out_the_line_of_each_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = SimpleNamespace(orig_shape=(4, 6), path="a.jpg", speed={"inference": 1.0})
    monkeypatch.setattr("paceline.commands.predict.predict", lambda options: [found])
    assert main(["predict", "a.jpg", "model=x"]) == 0
    assert capsys.readouterr().out.startswith("a.jpg 6 x 4: ")
    assert main(["predict", "a.jpg", "model=x", "verbose=False"]) == 0
    assert capsys.readouterr().out == ""
