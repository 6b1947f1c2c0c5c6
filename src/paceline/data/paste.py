"""Paste: objects cut out along their outlines, for other pictures: which ones, their pixels, and their boxes."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np

from paceline.data.draws import numbers
from paceline.data.tiles import map_points

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.config import AugmentConfig
    from paceline.data.index import Index

    Outline = tuple[int, list[NDArray[np.float64]]]

log = logging.getLogger("paceline")

CHOSEN = 0.5
"""Probability that an object of the image is pasted; one at least always is."""
_FINER = 4
"""Pixels of a mask are divided this often along each side, to count how much of each is covered."""
_COARSER = 2
"""Pixels of the picture, along each side, per cell of the table that tells how much of a box is covered."""
_FRACTION_BITS = 8


def usable(config: AugmentConfig, index: Index) -> AugmentConfig:
    """Return the options as this set can follow them: without outlines nothing is pasted, and the log says so."""
    if config.copy_paste > 0 and not index.polygons:
        log.warning(
            "copy_paste=%g does nothing: this data set has boxes but no outlines of objects (polygons).",
            config.copy_paste,
        )
        return replace(config, copy_paste=0.0)
    return config


def chosen(index: Index, image: int, pick: np.uint64) -> NDArray[np.int64]:
    """Rows of the index' boxes that `pick` chooses from the objects of `image`; none where none has an outline."""
    rows = np.arange(index.offsets[image], index.offsets[image + 1])
    rows = rows[index.polygons.outlined(rows) & ~(index.crowd[rows] | index.difficult[rows])]
    if not len(rows):
        return rows
    draws = numbers(np.array([pick]), len(rows))[0]
    taken = draws < CHOSEN
    taken[draws.argmin()] = True
    kept: NDArray[np.int64] = rows[taken]
    return kept


def mask_of(index: Index, rows: NDArray[np.int64], image: int, reduction: int) -> NDArray[np.uint8]:
    """Share, 0 to 255, of each pixel of the decoded `image` (reduced) that the objects `rows` cover, HW."""
    height, width = (-(-index.sizes[image].astype(int) // reduction)).tolist()
    mask = np.zeros((height, width), np.uint8)
    for row in rows.tolist():
        rings = [ring.astype(np.float64) / reduction for ring in index.polygons.outline(row)]
        points = np.concatenate(rings)
        left, top = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int).tolist()
        right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int).tolist()
        if right > left and bottom > top:
            shape = right - left, bottom - top
            fine = _drawn((shape[0] * _FINER, shape[1] * _FINER), [(ring - (left, top)) * _FINER for ring in rings])
            shares = cv2.resize(fine, shape, interpolation=cv2.INTER_AREA)
            part = mask[top:bottom, left:right]
            np.maximum(part, shares, out=part)
    return mask


def masks(index: Index, transforms: Transforms, row: int) -> dict[int, NDArray[np.uint8]]:
    """Masks of the tiles of picture `row` that paint only objects, by tile; those without an object have none."""
    found: dict[int, NDArray[np.uint8]] = {}
    if not transforms.masked[row].any():
        return found
    for tile in np.flatnonzero(transforms.masked[row] & (transforms.sources[row] >= 0)).tolist():
        image = int(transforms.sources[row, tile])
        rows = chosen(index, image, transforms.picks[row])
        if len(rows):
            found[tile] = mask_of(index, rows, image, int(transforms.reductions[row, tile]))
    return found


def outlines(index: Index, transforms: Transforms, row: int, tile: int) -> list[Outline]:
    """Objects that a tile pastes: row in the index' boxes, and rings in the picture, cut to the seen part."""
    seen, matrix = transforms.visible[row, tile], transforms.matrices[row, tile]
    rows = chosen(index, int(transforms.sources[row, tile]), transforms.picks[row])
    objects = []
    for box in rows.tolist():
        rings = [cut_ring(ring.astype(np.float64), seen) for ring in index.polygons.outline(box)]
        rings = [map_points(matrix, ring) for ring in rings if len(ring)]
        if rings:
            objects.append((box, rings))
    return objects


def cut_ring(ring: NDArray[np.float64], rectangle: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a ring P2 has within a rectangle 4 (xyxy): one ring Q2 of the same bounds and area; Q may be 0.

    Cut at one edge after the other (Sutherland, Hodgman: Reentrant Polygon Clipping, Communications of the ACM 17,
    1974); parts that are apart stay joined by lines along the edges.
    """
    for side, edge in enumerate(rectangle.tolist()):
        axis, sign = side % 2, 1 if side < 2 else -1
        depth = sign * (ring[:, axis] - edge)
        inside = depth >= 0
        if inside.all():
            continue
        crosses = inside != np.roll(inside, -1)
        share = depth / np.where(crosses, depth - np.roll(depth, -1), 1)
        meets = ring + share[:, None] * (np.roll(ring, -1, axis=0) - ring)
        meets[:, axis] = edge
        ring = np.stack([ring, meets], axis=1)[np.stack([inside, crosses], axis=1)]
    return ring


def covered(size: int, rings: list[NDArray[np.float64]], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share M of boxes M4 that rings, all in pixels of one picture, cover together; to a cell of 2 px."""
    cells = -(-size // _COARSER)
    table = np.zeros((cells, cells), np.uint8)
    for ring in rings:
        cv2.fillPoly(table, [_corners(ring / _COARSER)], 1, shift=_FRACTION_BITS)
    sums = cv2.integral(table)
    left, top = np.clip(np.floor(boxes[:, :2] / _COARSER), 0, cells - 1).astype(int).T
    right, bottom = np.clip(np.ceil(boxes[:, 2:] / _COARSER), 1, cells).astype(int).T
    inside = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    shares: NDArray[np.float64] = inside / np.maximum((right - left) * (bottom - top), 1)
    return shares


def _drawn(shape: tuple[int, int], rings: list[NDArray[np.float64]]) -> NDArray[np.uint8]:
    """Draw rings into a picture (`shape` is width, height): 255 inside, 0 outside, in between along the outline.

    `fillPoly` fills what is inside and all that the outline touches; of that, half is inside.
    """
    joined = np.zeros(shape[::-1], np.uint8)
    for number, ring in enumerate(rings):
        own = np.zeros_like(joined) if number else joined
        corners = [_corners(ring)]
        cv2.fillPoly(own, corners, 255, shift=_FRACTION_BITS)
        cv2.polylines(own, corners, True, 128, shift=_FRACTION_BITS)
        if number:
            np.maximum(joined, own, out=joined)
    return joined


def _corners(ring: NDArray[np.float64]) -> NDArray[np.int32]:
    """Corners as OpenCV draws them, from coordinates whose integers are the edges of pixels."""
    return np.rint((ring - 0.5) * (1 << _FRACTION_BITS)).astype(np.int32)
