"""Rows: boxes of some images while they are being checked, one row per box, before they become an index."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.findings import MOST_PER_KIND
from paceline.data.polygons import Polygons

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from paceline.data.findings import FindingCollector

TOLERANCE = 1e-3
"""Share of an image's side by which a box may reach outside for want of digits; it is clipped without a word."""
LEAST_SIDE_PX = 1e-3
"""Boxes narrower than this are no boxes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """M boxes, in any order of images."""

    images: NDArray[np.int64]
    """M, row of the image."""
    lines: NDArray[np.int64]
    """M, line in the file that they come from, or number of the object in it, from 1."""
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    """M4, xyxy in pixels of the image."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    area: NDArray[np.float64]
    """M, square pixels; NaN means that of the box."""
    polygons: Polygons = field(default_factory=Polygons.none)
    """Outlines of the boxes, in pixels, as they are written: not clipped to the image."""

    def __len__(self) -> int:
        return len(self.images)

    def select(self, picked: NDArray[np.bool_] | NDArray[np.int64]) -> Rows:
        """Return some of the rows, by mask or by number."""
        return Rows(
            images=self.images[picked],
            lines=self.lines[picked],
            labels=self.labels[picked],
            boxes=self.boxes[picked],
            crowd=self.crowd[picked],
            difficult=self.difficult[picked],
            area=self.area[picked],
            polygons=self.polygons.select(picked),
        )

    @classmethod
    def join(cls, parts: Iterable[Rows], first_images: Iterable[int]) -> Rows:
        """Put parts after each other, the images of each counted on from its number in `first_images`."""
        parts = tuple(parts)
        shifted = [part.images + first for part, first in zip(parts, first_images, strict=True)]
        return cls(
            images=np.concatenate([np.zeros(0, np.int64), *shifted]),
            lines=np.concatenate([np.zeros(0, np.int64), *(part.lines for part in parts)]),
            labels=np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
            boxes=np.concatenate([np.zeros((0, 4)), *(part.boxes for part in parts)]),
            crowd=np.concatenate([np.zeros(0, np.bool_), *(part.crowd for part in parts)]),
            difficult=np.concatenate([np.zeros(0, np.bool_), *(part.difficult for part in parts)]),
            area=np.concatenate([np.zeros(0), *(part.area for part in parts)]),
            polygons=Polygons.join([part.polygons for part in parts], [len(part) for part in parts]),
        )


def clean(
    rows: Rows,
    sizes: NDArray[np.integer],
    num_classes: int,
    file_of: Callable[[int], str],
    collector: FindingCollector,
) -> Rows:
    """Drop what is no box, clip the others to their image (`sizes` N2, height and width), and say what was done.

    `file_of` names the file that an image's boxes come from. The rows keep their order.
    """

    def drop(rows: Rows, kind: str, bad: NDArray[np.bool_], message: Callable[[int], str]) -> Rows:
        note(rows, kind, bad, message)
        return rows.select(~bad) if bad.any() else rows

    def note(rows: Rows, kind: str, bad: NDArray[np.bool_], message: Callable[[int], str]) -> None:
        numbers = np.flatnonzero(bad)
        for number in numbers[:MOST_PER_KIND]:
            collector.add(kind, file_of(int(rows.images[number])), int(rows.lines[number]), message(int(number)))
        collector.counts[kind] += max(len(numbers) - MOST_PER_KIND, 0)

    known = (rows.labels >= 0) & (rows.labels < num_classes)
    rows = drop(rows, "class", ~known, lambda m: unknown_class(int(rows.labels[m]), num_classes))
    finite = np.all(np.isfinite(rows.boxes), axis=1)
    rows = drop(rows, "number", ~finite, lambda _: "the box has a NaN or infinite number; draw it again")
    with np.errstate(over="ignore"):  # both corners may be as far out as numbers go
        sides = rows.boxes[:, 2:] - rows.boxes[:, :2]
    flat = np.any(sides < LEAST_SIDE_PX, axis=1)
    rows = drop(
        rows,
        "degenerate",
        flat,
        lambda m: f"the box is {_number(sides[m, 0])} x {_number(sides[m, 1])} px and has no area; draw it again",
    )
    limits = sizes[rows.images][:, [1, 0, 1, 0]].astype(np.float64)
    inside = np.clip(rows.boxes, 0, limits)
    lost = np.any(inside[:, 2:] - inside[:, :2] < LEAST_SIDE_PX, axis=1)
    before = rows
    rows = drop(rows, "range", lost, lambda m: _lies_outside(before.boxes[m], limits[m]))
    inside, limits = inside[~lost], limits[~lost]
    beyond = np.any(np.abs(inside - rows.boxes) > TOLERANCE * limits, axis=1)
    note(rows, "clipped", beyond, lambda _: "the box reaches outside the image and was clipped to it")
    rows = _with_boxes(rows, inside)
    twice = _repeated(rows)
    return drop(rows, "duplicate", twice, lambda _: "the box is there twice and counts once; remove one of them")


def unknown_class(label: int, num_classes: int) -> str:
    """Say that a class number is not in the list."""
    return (
        f"class {label} is not among the {num_classes} names (0 to {num_classes - 1}); correct it, or add its name"
        if num_classes > 1
        else f"class {label} is not 0, though the set has one name; correct it, or add its name"
    )


def _with_boxes(rows: Rows, boxes: NDArray[np.float64]) -> Rows:
    """Return the rows with other boxes, and areas where the annotation gave none."""
    own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    area = np.where(np.isfinite(rows.area), rows.area, own)
    return dataclasses.replace(rows, boxes=boxes, area=area)


def _repeated(rows: Rows) -> NDArray[np.bool_]:
    """M, True for every row that an earlier one equals in image, class, box and kind."""
    columns = (*rows.boxes.T, rows.crowd, rows.labels, rows.images)
    order = np.lexsort(columns)  # stable: of equal rows the earliest comes first
    repeated = np.zeros(len(rows), np.bool_)
    if len(rows) > 1:
        same = np.logical_and.reduce([column[order][1:] == column[order][:-1] for column in columns])
        repeated[order[1:]] = same
    return repeated


def _lies_outside(box: NDArray[np.float64], limits: NDArray[np.float64]) -> str:
    """Say that a box lies outside its image."""
    corners = ", ".join(_number(value) for value in box)
    return f"the box ({corners}) lies outside the image of {limits[0]:.0f} x {limits[1]:.0f} px; draw it again"


def _number(value: float) -> str:
    """Write a number as briefly as it allows."""
    return f"{value:.6g}"
