"""Curves: the course of a run over its epochs, precision over recall, and figures over the confidence threshold."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.drawing.figure import (
    add_legend,
    class_hue,
    literal,
    named_classes,
    new_figure,
    save_figure,
    say_empty,
    style_axes,
)
from paceline.drawing.palette import ACCENT, HUES, INK, MUTED, PAPER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

_MOST_BARS = 60
_SPAN_ORDER = (
    "data", "transfer", "forward", "loss", "backward", "optimiser", "ema", "device_wait", "evaluation",
    "evaluation_wait", "checkpoint", "checkpoint_wait", "pictures", "callbacks",
)  # fmt: skip
_SPAN_NAMES = {
    "ema": "average",
    "device_wait": "waiting for the device",
    "evaluation_wait": "waiting for an evaluation",
    "checkpoint_wait": "waiting for a checkpoint",
}


def run_curves(path: Path, records: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Draw a run from its epoch records, as `RunFolder.epochs` reads them: losses, AP, pace, seconds.

    Of records with the same epoch (a resumed run) the last counts; values that are missing leave gaps.
    """
    by_epoch = {int(record["epoch"]): record for record in records}
    lines = [by_epoch[epoch] for epoch in sorted(by_epoch)]
    figure = new_figure(13, 7.6, title)
    layout = [["loss", "ap", "quality"], ["rate", "seconds", "seconds"], ["pace", "seconds", "seconds"]]
    panels: dict[str, Axes] = figure.subplot_mosaic(layout, height_ratios=[2, 1, 1])
    epochs = np.array([int(record["epoch"]) for record in lines])
    _loss_panel(panels["loss"], epochs, lines)
    _ap_panel(panels["ap"], epochs, lines)
    _quality_panel(panels["quality"], epochs, lines)
    _single_panel(panels["rate"], epochs, _column(lines, "learning_rate"), "Learning rate", "{:.2g}")
    _single_panel(panels["pace"], epochs, _column(lines, "train_images_per_s"), "Training images per second", "{:,.0f}")
    _seconds_panel(panels["seconds"], epochs, lines)
    for axes in panels.values():
        _epoch_axis(axes, epochs)
    save_figure(path, figure)


def pr_curves(
    path: Path, recall_R: ArrayLike, precision_KR: ArrayLike, ap50_K: ArrayLike, names: Sequence[str]
) -> None:
    """Draw precision over recall at IoU 0.5, all in [0, 1]: a thin line per class, a thick one for their mean.

    Classes without truth (NaN or -1 in `ap50_K`) are left out. Up to 12 classes are coloured and named; of more, the
    six weakest.
    """
    ap50 = _defined(ap50_K)
    figure = new_figure(8.4, 5.6)
    axes = figure.subplots()
    style_axes(axes, "Precision over recall, IoU 0.5", "recall", "precision")
    mean = f"all classes  AP50 {np.nanmean(ap50):.3f}" if np.isfinite(ap50).any() else ""
    labels = [f"{literal(name)}  {figure_:.3f}" for name, figure_ in zip(names, ap50, strict=True)]
    _class_lines(axes, np.asarray(recall_R), _defined(precision_KR), ap50, labels, mean)
    save_figure(path, figure)


def confidence_curves(
    path: Path,
    confidence_C: ArrayLike,
    values_KC: ArrayLike,
    names: Sequence[str],
    title: str,
    ylabel: str,
    best: tuple[float, float] | None = None,
) -> None:
    """Draw precision, recall or F1 (in [0, 1]) over the confidence threshold: a thin line per class, their mean thick.

    `best` marks a threshold and the mean's value there. Rows that are NaN or -1 throughout are left out.
    """
    values = _defined(values_KC)
    figure = new_figure(8.4, 5.6)
    axes = figure.subplots()
    style_axes(axes, literal(title, 80), "confidence threshold", ylabel)
    peaks = np.array([np.nanmax(row) if np.isfinite(row).any() else np.nan for row in values])
    labels = [literal(name) for name in names]
    _class_lines(axes, np.asarray(confidence_C), values, peaks, labels, "all classes" if len(values) else "")
    if best is not None and np.isfinite(best).all():
        x, y = best
        axes.plot([x, x], [0, y], color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=4)
        axes.plot(x, y, marker="o", markersize=7, color=INK, markeredgecolor="white", zorder=6)
        side = -1 if x > 0.6 else 1
        axes.annotate(
            f"best {y:.3f} at {x:.3f}", (x, y), xytext=(9 * side, 8), textcoords="offset points",
            ha="left" if side == 1 else "right", fontsize=9, fontweight="bold", color=INK, zorder=7,
            bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )  # fmt: skip
    save_figure(path, figure)


def _class_lines(
    axes: Axes,
    x: NDArray[np.floating],
    values: NDArray[np.floating],
    figures_K: NDArray[np.floating],
    labels: Sequence[str],
    mean_label: str,
) -> None:
    known = np.flatnonzero(np.isfinite(figures_K)).tolist()
    axes.set(xlim=(0, 1), ylim=(0, 1.02))
    if not known:
        say_empty(axes, "no class has a box to be measured by")
        return
    named = named_classes(figures_K)
    for k in set(known) - set(named):
        axes.plot(x, values[k], color=MUTED, linewidth=0.7, alpha=0.35, zorder=2)
    handles = []
    for k in named:
        handles += axes.plot(x, values[k], color=class_hue(k), linewidth=1.4, label=labels[k], zorder=3)
    if len(known) > 1:
        (line,) = axes.plot(x, _mean_row(values[known]), color=INK, linewidth=2.8, label=mean_label, zorder=5)
        handles = [line, *handles]
    title = f"and the weakest of {len(known)} classes" if len(named) < len(known) else ""
    add_legend(axes, handles, place="right", title=title)


def _mean_row(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """Mean over rows, NaN left out, NaN where nothing is left."""
    finite = np.isfinite(values)
    total = np.where(finite, values, 0.0).sum(axis=0)
    count = finite.sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _loss_panel(axes: Axes, epochs: NDArray[np.int_], records: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, "Loss, with gains")
    for hue, part in zip(HUES, ("box", "cls", "dfl"), strict=False):
        values = _column(records, "loss", part)
        if np.isfinite(values).any():
            axes.plot(epochs, values, color=hue, linewidth=1.8, label=part, **_points(epochs))
    axes.set_ylim(bottom=0)
    add_legend(axes)


def _ap_panel(axes: Axes, epochs: NDArray[np.int_], records: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, "Average precision")
    _evaluated_line(axes, epochs, _column(records, "evaluation", "ap50"), "AP50", HUES[5])
    ap = _column(records, "evaluation", "ap")
    _evaluated_line(axes, epochs, ap, "AP", ACCENT)
    axes.set_ylim(0, 1)
    if np.isfinite(ap).any():
        best = int(np.nanargmax(ap))
        if ap[best] > 0:  # none is the best while nothing was found
            axes.plot(epochs[best], ap[best], marker="*", markersize=13, color=HUES[1], markeredgecolor="white",
                      linestyle="none", label=f"best AP {ap[best]:.3f}, epoch {epochs[best]}", zorder=5)  # fmt: skip
        add_legend(axes)
    else:
        say_empty(axes, "no evaluation yet")


def _quality_panel(axes: Axes, epochs: NDArray[np.int_], records: Sequence[Mapping[str, Any]]) -> None:
    style_axes(axes, "Precision and recall at the best threshold")
    for part, hue in (("precision", HUES[3]), ("recall", HUES[2])):
        _evaluated_line(axes, epochs, _column(records, "evaluation", part), part, hue)
    axes.set_ylim(0, 1)
    add_legend(axes)


def _evaluated_line(axes: Axes, epochs: NDArray[np.int_], values: NDArray[np.float64], label: str, hue: str) -> None:
    """Draw a line over those epochs that were evaluated."""
    shown = np.isfinite(values) & (values >= 0)
    if shown.any():
        axes.plot(epochs[shown], values[shown], color=hue, linewidth=1.8, label=label, **_points(epochs[shown]))


def _single_panel(axes: Axes, epochs: NDArray[np.int_], values: NDArray[np.float64], title: str, form: str) -> None:
    style_axes(axes, title)
    shown = np.isfinite(values)
    if shown.any():
        axes.plot(epochs[shown], values[shown], color=ACCENT, linewidth=1.6, **_points(epochs[shown]))
        axes.annotate(form.format(values[shown][-1]), (epochs[shown][-1], values[shown][-1]), xytext=(4, 4),
                      textcoords="offset points", fontsize=8, color=INK)  # fmt: skip
        axes.set_ylim(0, 1.25 * max(float(values[shown].max()), 1e-12))


def _seconds_panel(axes: Axes, epochs: NDArray[np.int_], records: Sequence[Mapping[str, Any]]) -> None:
    """Stack the spans of each epoch; thin slices are merged into the rest so that the legend stays short."""
    style_axes(axes, "Where the seconds of each epoch went, and their share of the run")
    spans = _spans(records)
    total = sum(float(values.sum()) for values in spans.values())
    if total <= 0:
        say_empty(axes, "no spans recorded")
        return
    small = [name for name, values in spans.items() if values.sum() < 0.005 * total]
    rest = sum((spans.pop(name) for name in [*small, "other"] if name in spans), np.zeros(len(epochs)))
    bottom = np.zeros(len(epochs))
    layers = [(name, values, HUES[k % len(HUES)]) for k, (name, values) in enumerate(spans.items())]
    for name, values, hue in [*layers, ("other", rest, MUTED)]:
        look: dict[str, Any] = {
            "color": hue,
            "label": f"{_SPAN_NAMES.get(name, literal(name))}  {float(values.sum()) / total:.0%}",
        }
        if len(epochs) <= _MOST_BARS:
            axes.bar(epochs, values, bottom=bottom, width=0.86, **look)
        else:
            edges = np.append(epochs - 0.5, epochs[-1] + 0.5)
            axes.stairs(bottom + values, edges, baseline=bottom, fill=True, **look)
        bottom = bottom + values
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, bottom.max() * 1.02)
    handles, _ = axes.get_legend_handles_labels()
    add_legend(axes, handles, place="below")


def _spans(records: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[np.float64]]:
    """Seconds per epoch of every span, those of a step first and in its order."""
    names = {name for record in records for name in (record.get("spans_s") or {})}
    order = {name: k for k, name in enumerate(_SPAN_ORDER)}
    ordered = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    return {name: np.nan_to_num(_column(records, "spans_s", name)) for name in ordered}


def _column(records: Sequence[Mapping[str, Any]], *keys: str) -> NDArray[np.float64]:
    """One figure of every record, NaN where it is missing."""
    return np.array([_figure(record, keys) for record in records], dtype=np.float64)


def _figure(record: Mapping[str, Any], keys: Sequence[str]) -> float:
    value: Any = record
    for key in keys:
        value = value.get(key) if value is not None else None
    return math.nan if value is None else float(value)


def _points(epochs: NDArray[np.int_]) -> dict[str, Any]:
    """Mark the points of short runs, where a line alone would hide them."""
    return {"marker": "o", "markersize": 4} if len(epochs) <= 12 else {}


def _epoch_axis(axes: Axes, epochs: NDArray[np.int_]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("epoch", fontsize=9, color=MUTED)
    if len(epochs):
        axes.set_xlim(epochs[0] - 0.6, epochs[-1] + 0.6)


def _defined(figures: ArrayLike) -> NDArray[np.float64]:
    """Figures with COCO's -1, which stands for "undefined", as NaN."""
    values = np.array(figures, dtype=np.float64)
    values[values < 0] = np.nan
    return values
