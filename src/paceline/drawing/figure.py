"""Figure: a page of plots in the house's look, written to a file; matplotlib's objects, never its global state."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from paceline.drawing.palette import GRID, INK, MUTED, PAPER, class_colour, to_hex
from paceline.drawing.text import drawable, fallback_families, one_line
from paceline.errors import UserError
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

DOTS_PER_INCH = 130
_MOST_NAMED = 12


def new_figure(width_in: float, height_in: float, title: str = "") -> Figure:
    """Make an empty page in inches; matplotlib is imported here, for it takes half a second."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), dpi=DOTS_PER_INCH, facecolor=PAPER)
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.1, wspace=0.03, hspace=0.03)
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(literal(title, 120), x=0.01, ha="left", fontsize=13, fontweight="bold", color=INK)
    return figure


def style_axes(axes: Axes, title: str, x_label: str = "", y_label: str = "") -> None:
    """Give the axes a title on the left, a light grid, and only two of four frame lines."""
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", color=INK, pad=8)
    axes.set_xlabel(x_label, fontsize=9, color=MUTED)
    axes.set_ylabel(y_label, fontsize=9, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, length=0)
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(GRID)


def add_legend(
    axes: Axes,
    handles: Sequence[Any] | None = None,
    *,
    place: Literal["inside", "right", "below"] = "inside",
    title: str = "",
) -> None:
    """Add a legend without a frame: in the emptiest corner, right of the axes, or in rows under them."""
    places: dict[str, dict[str, Any]] = {
        "inside": {"loc": "best"},
        "right": {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)},
        "below": {"loc": "upper left", "bbox_to_anchor": (-0.01, -0.13), "ncols": 5},
    }
    shown = axes.get_legend_handles_labels()[0] if handles is None else list(handles)
    if shown:
        legend = axes.legend(handles=shown, fontsize=8, title=title or None, **places[place])
        legend.get_frame().set(facecolor=PAPER, edgecolor="none", alpha=0.8)
        legend.get_title().set(fontsize=8, color=MUTED)
        for text in legend.get_texts():
            text.set_color(INK)


def say_empty(axes: Axes, sentence: str) -> None:
    """Write in the middle of empty axes why they are empty."""
    axes.text(0.5, 0.5, sentence, transform=axes.transAxes, ha="center", va="center", fontsize=9, color=MUTED)


def literal(text: str, longest: int = 28) -> str:
    """Make matplotlib show a name to the letter: one line, no formulas, never hidden from a legend."""
    shown = drawable(one_line(text, longest)).replace("$", r"\$")
    return f"\u2009{shown}" if not shown or shown.startswith("_") else shown


def named_classes(figures_K: NDArray[np.floating]) -> list[int]:
    """Pick the classes to name in a legend: all of a few in their order, else the weakest, weakest first."""
    known = np.flatnonzero(np.isfinite(figures_K))
    if len(known) <= _MOST_NAMED:
        return [int(k) for k in known]
    weakest = known[np.argsort(figures_K[known], kind="stable")]
    return [int(k) for k in weakest[: _MOST_NAMED // 2]]


def class_hue(label: int) -> str:
    """Colour of a class, `#rrggbb`, the same as its boxes have."""
    return to_hex(class_colour(label))


def save_figure(path: Path, figure: Figure) -> None:
    """Write the figure as PNG (or PDF, SVG, JPEG by the name's ending), whole or not at all.

    Raises UserError for another ending, or when the file cannot be written.
    """
    from matplotlib.text import Text

    kind = path.suffix.lower().lstrip(".")
    if kind not in {"png", "pdf", "svg", "jpg", "jpeg"}:
        raise UserError(f"Cannot write a figure as {path.name}: end its name in .png, .jpg, .svg or .pdf.")
    families = ["DejaVu Sans", *fallback_families()]
    for text in figure.findobj(Text):
        text.set_fontfamily(families)
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=DOTS_PER_INCH)
    write_atomically(path, content.getvalue())
