"""Data set at a glance: how many boxes of each class, where they are, how large, and the sizes of the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.drawing.figure import class_hue, literal, new_figure, save_figure, say_empty, style_axes
from paceline.drawing.palette import ACCENT, INK, MUTED, PAPER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

_MOST_NAMED = 80
_MOST_SCATTERED = 2000


def dataset_plot(
    path: Path,
    labels_M: ArrayLike,
    boxes_M4: ArrayLike,
    image_sizes_N2: ArrayLike,
    names: Sequence[str],
    title: str = "",
) -> None:
    """Draw a data set: boxes are cx, cy, w, h as shares of their image, image sizes (height, width) in px."""
    labels = np.asarray(labels_M, dtype=np.int64).reshape(-1)
    boxes = np.asarray(boxes_M4, dtype=np.float64).reshape(-1, 4)
    sizes = np.asarray(image_sizes_N2, dtype=np.int64).reshape(-1, 2)
    counts = np.bincount(labels, minlength=len(names))[: len(names)]
    rows, sentence = _shown_classes(counts)
    strips = np.array_split(rows, 2) if len(rows) > _MOST_NAMED // 2 else [rows]
    figure = new_figure(11 + 2.6 * len(strips), float(np.clip(2 + 0.155 * len(strips[0]), 7.2, 8.6)), title)
    left = [f"classes {k}" for k in range(len(strips))]
    panels: dict[str, Axes] = figure.subplot_mosaic(
        [[*left, "centres", "sides"], [*left, "spread", "images"]],
        width_ratios=[1.25 / len(strips) ** 0.5] * len(strips) + [1, 1],
    )
    for k, strip in enumerate(strips):
        heading = f"{len(labels):,} {'box' if len(labels) == 1 else 'boxes'}, {sentence}" if k == 0 else ""
        _class_panel(panels[left[k]], heading, counts, strip, names)
    _centre_panel(panels["centres"], boxes)
    _side_panel(panels["sides"], boxes)
    _spread_panel(panels["spread"], boxes)
    _image_panel(panels["images"], sizes)
    save_figure(path, figure)


def _shown_classes(counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], str]:
    """All classes in their order; of more than 80, the most and the least frequent; and what to call them."""
    if len(counts) <= _MOST_NAMED:
        return np.arange(len(counts)), "1 class" if len(counts) == 1 else f"{len(counts)} classes"
    by_count = np.argsort(-counts, kind="stable")
    half = _MOST_NAMED // 2
    return np.concatenate([by_count[:half], by_count[-half:]]), f"{len(counts):,} classes (most and least frequent)"


def _class_panel(
    axes: Axes, title: str, counts: NDArray[np.int64], rows: NDArray[np.int64], names: Sequence[str]
) -> None:
    """Draw bars of box counts, from top to bottom."""
    style_axes(axes, title, "boxes")
    places = np.arange(len(rows))
    shown = rows.tolist()
    axes.barh(places, counts[rows], height=0.78, color=[class_hue(k) for k in shown])
    size = float(np.clip(300 / max(len(rows), 1), 6, 9))
    axes.set_yticks(places, [literal(names[k], 24) for k in shown], fontsize=size, color=INK)
    axes.set_ylim(max(len(rows), 8) - 0.4, -0.6)
    axes.set_xlim(0, max(int(counts.max(initial=0)), 1) * 1.18)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(visible=False, axis="y")
    for place, k in enumerate(shown):
        axes.annotate(f"{counts[k]:,}", (counts[k], place), xytext=(3, 0), textcoords="offset points",
                      va="center", fontsize=size, color=MUTED)  # fmt: skip


def _centre_panel(axes: Axes, boxes: NDArray[np.float64]) -> None:
    style_axes(axes, "Centres of the boxes", "x, share of the width", "y, share of the height")
    axes.grid(visible=False)
    axes.set(xlim=(0, 1), ylim=(1, 0), aspect="equal")
    if not len(boxes):
        say_empty(axes, "no boxes")
        return
    cells = int(np.clip(len(boxes) ** 0.5 / 3, 8, 48))
    density, _, _ = np.histogram2d(boxes[:, 1], boxes[:, 0], bins=cells, range=[[0, 1], [0, 1]])
    axes.imshow(density, extent=(0, 1, 1, 0), cmap=_density_colours(), interpolation="nearest", vmin=0)


def _side_panel(axes: Axes, boxes: NDArray[np.float64]) -> None:
    style_axes(axes, "Width and height of the boxes", "width, share of the image", "height, share of the image")
    sides = boxes[:, 2:][(boxes[:, 2:] > 0).all(axis=1)]
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if not len(sides):
        say_empty(axes, "no boxes")
        return
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
    if len(sides) <= _MOST_SCATTERED:
        axes.scatter(sides[:, 0], sides[:, 1], s=9, color=ACCENT, alpha=0.35, linewidths=0)
    else:
        axes.hexbin(sides[:, 0], sides[:, 1], gridsize=48, extent=(0, 1, 0, 1), bins="log", mincnt=1,
                    cmap=_density_colours(), linewidths=0.1)  # fmt: skip


def _spread_panel(axes: Axes, boxes: NDArray[np.float64]) -> None:
    """Histogram of the mean side, on a logarithmic axis, since detectors feel ratios."""
    style_axes(axes, "Mean side of the boxes", "√(width × height), share of the image", "boxes")
    area = boxes[:, 2] * boxes[:, 3]
    sides = np.sqrt(area[area > 0])
    if not len(sides):
        say_empty(axes, "no boxes")
        return
    low = min(float(sides.min()), 0.1) * 0.9
    edges = np.geomspace(low, 1.0, 41)
    axes.hist(np.minimum(sides, 1.0), bins=edges.tolist(), color=ACCENT)
    axes.set(xscale="log", xlim=(low, 1))
    _percent_ticks(axes.xaxis, low)
    middle = float(np.median(sides))
    axes.axvline(middle, color=INK, linewidth=1.2)
    axes.annotate(f"median {middle:.2g}", (middle, 1), xycoords=("data", "axes fraction"), xytext=(4, -10),
                  textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
    axes.grid(visible=False, axis="x")


def _percent_ticks(axis: Any, low: float) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    ticks = [tick for tick in (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0) if tick >= low]
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])


def _image_panel(axes: Axes, sizes: NDArray[np.int64]) -> None:
    different, counts = np.unique(sizes, axis=0, return_counts=True)
    title = f"{len(sizes):,} {'image' if len(sizes) == 1 else 'images'}, {len(different):,} "
    style_axes(axes, title + ("size" if len(different) == 1 else "sizes"), "width, px", "height, px")
    if not len(sizes):
        say_empty(axes, "no images")
        return
    area = 20 + 380 * counts / counts.max() if len(different) <= 50 else np.full(len(different), 12.0)
    axes.scatter(different[:, 1], different[:, 0], s=area, color=ACCENT, alpha=0.45, linewidths=0)
    limit = float(sizes.max()) * 1.12
    axes.plot([0, limit], [0, limit], color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
    axes.set(xlim=(0, limit), ylim=(0, limit), aspect="equal")
    top = int(counts.argmax())
    words = f"{different[top, 1]} × {different[top, 0]}" + (f": {counts[top]:,}" if len(different) > 1 else "")
    axes.annotate(words, (different[top, 1], different[top, 0]), xytext=(0, 12), textcoords="offset points",
                  ha="right" if different[top, 1] > limit / 2 else "left", fontsize=8, color=INK,
                  bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1})  # fmt: skip


def _density_colours() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("density", ["#f3f7fd", "#9cc3f2", ACCENT, "#0b2c5c"])
