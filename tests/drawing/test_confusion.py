from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.drawing.confusion import confusion_matrix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Read = Callable[[Path], np.ndarray]

DARK = (0x12, 0x3F, 0x7D)


def dark(picture: np.ndarray) -> np.ndarray:
    return (np.abs(picture[:, : int(picture.shape[1] * 0.9)].astype(int) - DARK) < 6).all(axis=2)


@pytest.mark.parametrize("num_classes", [1, 3, 20, 80, 160])
def test_a_perfect_detector_has_a_dark_diagonal(num_classes: int, tmp_path: Path, pixels: Read) -> None:
    matrix = np.diag(np.arange(5, num_classes + 6))
    matrix[-1, -1] = 0
    names = [f"class with a long name {k}" for k in range(num_classes)]
    confusion_matrix(tmp_path / "matrix.png", matrix, names)
    rows, columns = np.nonzero(dark(pixels(tmp_path / "matrix.png")))
    assert len(rows) > 1000
    if num_classes > 1:
        assert np.corrcoef(rows, columns)[0, 1] > 0.8


def test_columns_are_shares_of_the_truth(tmp_path: Path, pixels: Read) -> None:
    matrix = np.array([[10, 0, 3], [0, 20, 1], [0, 0, 0]])
    confusion_matrix(tmp_path / "a.png", matrix, ["a", "b"])
    confusion_matrix(tmp_path / "b.png", matrix.T, ["a", "b"])
    top, left = (np.flatnonzero(dark(pixels(tmp_path / "a.png")).any(axis=axis))[0] for axis in (1, 0))
    assert 0 < top < 100
    assert left < 350
    assert dark(pixels(tmp_path / "a.png")).sum() > 1.4 * dark(pixels(tmp_path / "b.png")).sum()


def test_an_empty_matrix_has_no_coloured_cell(tmp_path: Path, pixels: Read) -> None:
    matrix = np.zeros((4, 4))
    confusion_matrix(tmp_path / "matrix.png", matrix, ["a", "$b$", "_c"])
    picture = pixels(tmp_path / "matrix.png")
    assert not dark(picture).any()
    assert (matrix == 0).all()
