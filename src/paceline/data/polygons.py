"""Polygons: the outlines of boxes, as one ragged table of points."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Polygons:
    """The outlines of M boxes: each is any number of rings, whose union is the object.

        boxes   [0        2     3]      box 0 has rings 0 and 1, box 1 has ring 2
        rings   [0   3    7     11]     ring 1 is points 3 to 6
        points  [.............. ]

    A table without any ring may leave `boxes` empty, whatever M is.
    """

    points: NDArray[np.float32]
    """P2, x and y in pixels of the image."""
    rings: NDArray[np.int64]
    """R + 1, first point of each ring."""
    boxes: NDArray[np.int64]
    """M + 1, first ring of each box."""

    @classmethod
    def none(cls) -> Self:
        """No box has an outline."""
        return cls(points=np.zeros((0, 2), np.float32), rings=np.zeros(1, np.int64), boxes=np.zeros(0, np.int64))

    @classmethod
    def of(cls, outlines: Iterable[Sequence[ArrayLike]]) -> Self:
        """Pack the rings (each P2) of every box."""
        counts, rings = [0], []
        for outline in outlines:
            counts.append(len(outline))
            rings += [np.asarray(ring, np.float32).reshape(-1, 2) for ring in outline]
        if not rings:
            return cls.none()
        return cls(
            points=np.concatenate(rings),
            rings=np.cumsum([0, *(len(ring) for ring in rings)], dtype=np.int64),
            boxes=np.cumsum(counts, dtype=np.int64),
        )

    @classmethod
    def join(cls, parts: Sequence[Self], lengths: Sequence[int]) -> Self:
        """Put tables after each other; `lengths` are their numbers of boxes, since those without rings may not know."""
        if not any(parts):
            return cls.none()
        counts = [part.num_rings(length) for part, length in zip(parts, lengths, strict=True)]
        sides = [np.diff(part.rings) for part in parts]
        return cls(
            points=np.concatenate([part.points for part in parts]),
            rings=_offsets(np.concatenate(sides)),
            boxes=_offsets(np.concatenate(counts)),
        )

    def __bool__(self) -> bool:
        """Say whether any box has an outline."""
        return len(self.rings) > 1

    def num_rings(self, num_boxes: int) -> NDArray[np.int64]:
        """Rings M of each of `num_boxes` boxes."""
        return np.diff(self.boxes) if len(self.boxes) else np.zeros(num_boxes, np.int64)

    def outline(self, box: int) -> list[NDArray[np.float32]]:
        """Rings of a box, each P2."""
        if not self:
            return []
        first, last = int(self.boxes[box]), int(self.boxes[box + 1])
        return [self.points[self.rings[ring] : self.rings[ring + 1]] for ring in range(first, last)]

    def outlined(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the boxes `rows` have an outline."""
        if not self:
            return np.zeros(len(rows), np.bool_)
        found: NDArray[np.bool_] = self.boxes[rows + 1] > self.boxes[rows]
        return found

    def select(self, picked: NDArray[np.bool_] | NDArray[np.int64]) -> Polygons:
        """Return the outlines of some of the boxes, by mask or by number, in that order."""
        if not self:
            return self
        rows: NDArray[np.int64] = np.arange(len(self.boxes) - 1)[picked]
        rings, boxes = _gather(self.boxes, rows)
        points, starts = _gather(self.rings, rings)
        return Polygons(points=self.points[points], rings=starts, boxes=boxes)


def _offsets(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _gather(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Members of the groups `rows`, and the offsets of these groups among them."""
    counts = (offsets[rows + 1] - offsets[rows]).astype(np.int64)
    starts = _offsets(counts)
    return np.arange(starts[-1]) + np.repeat(offsets[rows] - starts[:-1], counts), starts
