"""Confusion matrix: what the boxes of every class were taken for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.drawing.figure import literal, new_figure, save_figure, style_axes
from paceline.drawing.palette import ACCENT, INK, MUTED, PAPER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

_MOST_COUNTED = 20
_MOST_NAMED = 150


def confusion_matrix(path: Path, matrix: ArrayLike, names: Sequence[str]) -> None:
    """Draw counts (K+1)(K+1): row = predicted class, column = true class, last = background (missed, or made up).

    Each column is coloured by its shares; up to 20 classes the cells carry shares and counts, up to 150 every class
    is named.
    """
    counts = np.asarray(matrix, dtype=np.float64)
    num_classes = len(names)
    assert counts.shape == (num_classes + 1, num_classes + 1), counts.shape
    side_in = float(np.clip(2.6 + 0.52 * num_classes, 5.2, 13.5))
    figure = new_figure(side_in + 1.1, side_in)
    axes = figure.subplots()
    style_axes(axes, "Confusion matrix: share of each true class")
    axes.grid(visible=False)
    shares = _column_shares(counts)
    shown = np.ma.masked_where(counts == 0, shares)
    image = axes.imshow(shown, cmap=_colours(), vmin=0, vmax=1, interpolation="nearest")
    _name_axes(axes, names)
    if num_classes <= _MOST_COUNTED:
        _write_cells(axes, counts, shares)
    _rule_off_background(axes, num_classes)
    bar = figure.colorbar(image, ax=axes, shrink=0.6, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=MUTED, length=0)
    save_figure(path, figure)


def _column_shares(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of each cell in its column; 0 throughout an empty column."""
    total = counts.sum(axis=0, keepdims=True)
    shares: NDArray[np.float64] = np.divide(counts, total, out=np.zeros_like(counts), where=total > 0)
    return shares


def _colours() -> Any:
    """From nearly white to the accent; cells without a count stay white."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", ["#eef4fc", "#9cc3f2", ACCENT, "#123f7d"]).with_extremes(
        bad=PAPER
    )


def _name_axes(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlabel("true", fontsize=10, color=INK)
    axes.set_ylabel("predicted", fontsize=10, color=INK)
    if len(names) > _MOST_NAMED:
        return
    words = [literal(name, 22) for name in names] + ["background"]
    size = float(np.clip(420 / len(words), 4.5, 9))
    ticks = range(len(words))
    flat = len(words) <= 6 and max(len(word) for word in words) <= 16
    axes.set_xticks(ticks, words, rotation=0 if flat else 90, fontsize=size, color=INK)
    axes.set_yticks(ticks, words, fontsize=size, color=INK)


def _write_cells(axes: Axes, counts: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
    """Write share over count into every cell that has one."""
    size = float(np.clip(95 / len(counts), 5.5, 10))
    for row, column in np.argwhere(counts > 0).tolist():
        colour = PAPER if shares[row, column] > 0.5 else INK
        words = f"{shares[row, column]:.2f}\n{counts[row, column]:,.0f}"
        axes.text(column, row, words, ha="center", va="center", fontsize=size, color=colour, linespacing=1.15)


def _rule_off_background(axes: Axes, num_classes: int) -> None:
    """Set the row and column of the background apart by a line."""
    axes.axhline(num_classes - 0.5, color=MUTED, linewidth=0.8)
    axes.axvline(num_classes - 0.5, color=MUTED, linewidth=0.8)
