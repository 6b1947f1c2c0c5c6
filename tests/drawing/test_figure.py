from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.drawing.figure import literal, named_classes, new_figure, save_figure
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


def test_matplotlib_is_imported_only_when_something_is_drawn_and_pyplot_never(tmp_path: Path) -> None:
    code = f"""
import pathlib, sys
from paceline.drawing import boxes, confusion, curves, dataset
assert "matplotlib" not in sys.modules and "cv2" not in sys.modules and "torch" not in sys.modules
curves.confidence_curves(pathlib.Path({str(tmp_path)!r}) / "a.png", [0, 1], [[0, 1]], ["x"], "t", "y")
assert "matplotlib.figure" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("name", ["$x^2$", "_hidden", "100 % \\alpha", "a_b^c{", "猫", "x" * 500, "", "[b]"])
def test_any_name_can_be_drawn(name: str, tmp_path: Path) -> None:
    figure = new_figure(8, 4, name)
    axes = figure.subplots()
    (line,) = axes.plot([0, 1], label=literal(name))
    legend = axes.legend(handles=[line])
    save_figure(tmp_path / "a.png", figure)
    assert len(legend.get_texts()) == 1
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".jpg"])
def test_figures_are_written_in_the_format_of_their_name(suffix: str, tmp_path: Path) -> None:
    save_figure(tmp_path / f"a{suffix}", new_figure(1, 1))
    start = (tmp_path / f"a{suffix}").read_bytes()[:5]
    assert start == {".png": b"\x89PNG\r", ".svg": b"<?xml", ".pdf": b"%PDF-", ".jpg": b"\xff\xd8\xff\xe0\x00"}[suffix]


def test_figures_that_cannot_be_written_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"end its name in \.png"):
        save_figure(tmp_path / "a.docx", new_figure(1, 1))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write"):
        save_figure(tmp_path / "file" / "a.png", new_figure(1, 1))


def test_few_classes_are_named_in_order_and_of_many_the_weakest() -> None:
    assert named_classes(np.array([0.5, np.nan, 0.1])) == [0, 2]
    figures = np.linspace(1, 0, 40)
    figures[39] = np.nan
    assert named_classes(figures) == [38, 37, 36, 35, 34, 33]
    assert named_classes(np.full(3, np.nan)) == []
