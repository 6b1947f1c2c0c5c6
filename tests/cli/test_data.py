"""`paceline data`: a small set written by the test is checked and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from paceline.cli.main import main

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / "images" / split).mkdir(parents=True)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for number in range(count):
            image = np.full((48, 64, 3), 40 * number, np.uint8)
            image[0, 0] = len(split)
            cv2.imwrite(str(tmp_path / "images" / split / f"{number}.png"), image)
            (tmp_path / "labels" / split / f"{number}.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.5 0.25\n")
    path = tmp_path / "data.yaml"
    path.write_text("train: images/train\nval: images/val\nnames: [disc, ring]\n")
    return path


def test_check_reports_and_draws(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = data.parent / "plot.png"
    assert main(["data", "check", str(data), "--plot", str(plot)]) == 0
    text = capsys.readouterr().out
    assert "3 images" in text
    assert "ring" in text
    assert cv2.imread(str(plot)) is not None


def test_a_set_that_cannot_be_trained_on_is_status_2(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data.parent / "labels" / "train").iterdir():
        path.write_text("7 0.5 0.5 0.25 0.5\n")
    assert main(["data", "check", str(data)]) == 2
    output = capsys.readouterr()
    assert "Traceback" not in output.out + output.err


def test_a_test_split_that_is_not_there_is_status_0_and_left_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with data.open("a") as stream:
        stream.write("test: ../test/images\n")
    assert main(["data", "check", str(data)]) == 0
    output = capsys.readouterr()
    assert "test cannot be evaluated:" in output.out
    assert "No training" not in output.out
    assert main(["data", "pack", str(data), str(tmp_path / "set.pack")]) == 0
    assert main(["data", "convert", str(data), str(tmp_path / "out"), "--format", "coco"]) == 0
    assert caplog.text.count("test is left out") == 2
    assert capsys.readouterr().out.count("5 images (train, val)") == 2
    assert main(["data", "pack", str(data), str(tmp_path / "other.pack"), "--splits", "train", "test"]) == 2
    assert not (tmp_path / "other.pack").exists()


def test_plot(data: Path) -> None:
    plot = data.parent / "other.svg"
    assert main(["data", "plot", f"data={data}", str(plot)]) == 0
    assert plot.read_text().lstrip().startswith("<?xml")
