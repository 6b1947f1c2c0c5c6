"""Tiles: where the parts of source images lie in a picture, one map for each.

    source images          canvas, 2 x 2 of the network's input      output, 1 x 1

    [ 0 ]  [ 1 ]   ratio   +-------+---+   perspective, zoom, turn,  +------+
    [ 2 ]  [ 3 ]  ------>  |   0   | 1 |     ---------------------> |  0 |1|   flips are folded into the matrix
                           +-------+---+      shear about the        |----+-|
                           |   2   | 3 |      centre, then shift     |  2 |3|
                           +-------+---+                             +------+

Each image's long side is scaled to the input's side; mosaic lays four of them around a random point of the canvas,
else one lies in the middle of a 1 x 1 canvas. A tile is the part of one source image that is seen.

Where nothing is turned (no rotation, shear or perspective) the map is snapped: whole source pixels to whole output
pixels, so that a plain resize writes the tile into its place. The matrix is that of the snapped map, so boxes follow
the pixels exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.slots import Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig

_HALVE_BEYOND = 1.6
_MOST_TILT = 0.75
"""Nothing on the canvas is nearer than this leaves it: depths lie between 1/4 and 7/4."""
_BEFORE = np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
"""Tiles of a mosaic that end at its centre along (x, y), rather than start there."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """How T tiles lie in each of B pictures; the fields are those of `Transforms`."""

    matrices: NDArray[np.float64]
    visible: NDArray[np.float64]
    places: NDArray[np.int64]
    halvings: NDArray[np.int64]
    present: NDArray[np.bool_]
    """BT, False where there is no tile or nothing of it is seen."""


def is_aligned(config: AugmentConfig) -> bool:
    """Say whether tiles are snapped: nothing is turned."""
    return config.degrees == 0 and config.shear == 0 and config.perspective == 0


def lay_tiles(
    config: AugmentConfig,
    size: int,
    draws: NDArray[np.float64],
    sizes: NDArray[np.integer[Any]],
    reductions: NDArray[np.int64],
    grouped: NDArray[np.bool_],
) -> Tiles:
    """Lay T images of `sizes` BT2 (height, width) out by numbers BS; only where `grouped` B more than the first one."""
    extents = sizes[..., ::-1].astype(np.float64)  # (width, height), as x and y are
    ratios = size / extents.max(axis=-1)
    scaled = extents * ratios[..., None]
    canvas = np.where(grouped, 2.0 * size, float(size))
    edges = np.empty((*ratios.shape, 4))  # on the canvas
    edges[..., :2] = _corners(size, draws, scaled, canvas, grouped)
    edges[..., 2:] = edges[..., :2] + scaled
    place = _place_aligned if is_aligned(config) else _place_turned
    matrices, visible, places, halvings = place(config, size, draws, canvas, ratios, edges, extents, reductions)
    present: NDArray[np.bool_] = (places[..., 2] > places[..., 0]) & (places[..., 3] > places[..., 1])
    if ratios.shape[1] > 1:
        present[:, 1:] &= grouped[:, None]
    return Tiles(matrices=matrices, visible=visible, places=places, halvings=halvings, present=present)


def mirror(size: int, flips: NDArray[np.bool_], matrices: NDArray[np.float64], places: NDArray[np.int64]) -> None:
    """Fold flips B2 into matrices BT33 and places BT4, in place."""
    for axis in (0, 1):
        rows = np.flatnonzero(flips[:, axis])
        if len(rows):
            moved, last = matrices[rows], matrices[rows, :, 2]
            moved[:, :, axis] = size * last - moved[:, :, axis]
            matrices[rows] = moved
            turned = places[rows]
            turned[..., [axis, axis + 2]] = size - turned[..., [axis + 2, axis]]
            places[rows] = turned


def _corners(
    size: int,
    draws: NDArray[np.float64],
    scaled: NDArray[np.float64],
    canvas: NDArray[np.float64],
    grouped: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Upper left corners BT2 of the tiles on the canvas."""
    if not grouped.any():
        return (canvas[:, None, None] - scaled) / 2
    centre = size * (0.5 + draws[:, Slot.CENTRE_X : Slot.CENTRE_Y + 1])
    around: NDArray[np.float64] = centre[:, None] - _BEFORE[: scaled.shape[1]] * scaled
    if grouped.all():
        return around
    return np.where(grouped[:, None, None], around, (canvas[:, None, None] - scaled) / 2)


def _place_aligned(
    config: AugmentConfig,
    size: int,
    draws: NDArray[np.float64],
    canvas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    edges: NDArray[np.float64],
    extents: NDArray[np.float64],
    reductions: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Snap every tile: matrices BT33, visible BT4, places BT4, halvings BT (before flips)."""
    zoom, target = _zoom(config, draws), _target(config, size, draws)
    offset = np.concatenate([target, target], axis=1)
    offset -= (zoom * (canvas / 2))[:, None]
    offset = offset[:, None]  # B14
    start = zoom[:, None, None] * edges[..., :2] + offset[..., :2]
    # Tiles share their borders on the canvas, so they share them after rounding too: no gap, no overlap.
    bounds = zoom[:, None, None] * _within(edges, 0.0, canvas[:, None, None]) + offset
    bounds = _within(np.rint(bounds, out=bounds), 0.0, float(size))
    scale = zoom[:, None] * ratios
    decoded = np.ceil(extents / reductions[..., None])
    halvings = _halvings(1 / (scale * reductions), decoded)
    limit = np.maximum(decoded // (1 << halvings)[..., None], 1) if halvings.any() else decoded
    unit = (reductions << halvings)[..., None]
    visible = np.concatenate([bounds[..., :2] - start, bounds[..., 2:] - start], axis=-1)
    visible /= scale[..., None]
    visible /= unit
    np.rint(visible, out=visible)
    low, high = visible[..., :2], visible[..., 2:]
    np.minimum(np.maximum(low, 0, out=low), limit - 1, out=low)
    np.minimum(np.maximum(high, low + 1, out=high), limit, out=high)
    visible *= unit
    snapped = (bounds[..., 2:] - bounds[..., :2]) / (high - low)
    matrices = np.zeros((*ratios.shape, 3, 3))
    matrices[..., 0, 0], matrices[..., 1, 1], matrices[..., 2, 2] = snapped[..., 0], snapped[..., 1], 1
    matrices[..., :2, 2] = bounds[..., :2] - low * snapped
    return matrices, visible, bounds.astype(np.int64), halvings


def _place_turned(
    config: AugmentConfig,
    size: int,
    draws: NDArray[np.float64],
    canvas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    edges: NDArray[np.float64],
    extents: NDArray[np.float64],
    reductions: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Exact maps of every tile: matrices BT33, visible BT4, places BT4, halvings BT (before flips)."""
    whole = _canvas_map(config, size, draws, canvas)
    matrices = np.empty((*ratios.shape, 3, 3))
    matrices[..., :2] = whole[:, None, :, :2] * ratios[..., None, None]
    matrices[..., 2] = np.einsum("bij,btj->bti", whole[..., :2], edges[..., :2]) + whole[:, None, :, 2]
    corners = edges[..., [0, 1, 0, 1]]
    visible = (_within(edges, 0.0, canvas[:, None, None]) - corners) / ratios[..., None]
    bounds = map_boxes(matrices, visible)
    places = np.concatenate([np.floor(bounds[..., :2]), np.ceil(bounds[..., 2:])], axis=-1)
    middle = (visible[..., :2] + visible[..., 2:]) / 2
    depth = (matrices[..., 2, :2] * middle).sum(axis=-1) + matrices[..., 2, 2]
    shrink = 1 / (np.sqrt(np.abs(np.linalg.det(matrices) / depth**3)) * reductions)
    halvings = _halvings(shrink, np.ceil(extents / reductions[..., None]))
    return matrices, visible, np.clip(places, 0, size).astype(np.int64), halvings


def _canvas_map(
    config: AugmentConfig, size: int, draws: NDArray[np.float64], canvas: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return maps B33 from canvas to output, about the middle: perspective, zoom and turn, shear, then shift."""
    both_ways = 2 * draws - 1
    zoom, angle = _zoom(config, draws), np.deg2rad(config.degrees * both_ways[:, Slot.ANGLE])
    cosine, sine = zoom * np.cos(angle), zoom * np.sin(angle)
    turn = np.stack([cosine, sine, -sine, cosine], axis=-1).reshape(-1, 2, 2)
    shear = np.tile(np.eye(2), (len(draws), 1, 1))
    shear[:, 0, 1] = np.tan(np.deg2rad(config.shear * both_ways[:, Slot.SHEAR_X]))
    shear[:, 1, 0] = np.tan(np.deg2rad(config.shear * both_ways[:, Slot.SHEAR_Y]))
    target = _target(config, size, draws)
    tilt = config.perspective * both_ways[:, Slot.PERSPECTIVE_X : Slot.PERSPECTIVE_Y + 1]
    # Depth is 1 + tilt . (x, y) from the canvas' middle. Its horizon stays outside the canvas.
    steepest = np.abs(tilt).sum(axis=1) * (canvas / 2)
    tilt /= np.maximum(steepest / _MOST_TILT, 1)[:, None]
    maps = np.empty((len(draws), 3, 3))
    maps[:, :2, :2] = shear @ turn + target[:, :, None] * tilt[:, None, :]
    maps[:, 2, :2] = tilt
    maps[:, :, 2] = -maps[:, :, :2].sum(axis=2) * (canvas / 2)[:, None]
    maps[:, :2, 2] += target
    maps[:, 2, 2] += 1
    return maps


def _zoom(config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    return 1 + config.scale * (2 * draws[:, Slot.ZOOM] - 1)


def _target(config: AugmentConfig, size: int, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where the canvas' middle comes to lie, B2."""
    return size * (0.5 + config.translate * (2 * draws[:, Slot.SHIFT_X : Slot.SHIFT_Y + 1] - 1))


def _within(
    values: NDArray[np.float64], low: float | NDArray[np.float64], high: float | NDArray[np.float64]
) -> NDArray[np.float64]:
    """Clip, in a fraction of the time that `np.clip` takes for few numbers."""
    clipped = np.maximum(values, low)
    return np.minimum(clipped, high, out=clipped)


def _halvings(shrink: NDArray[np.float64], decoded: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count how often to halve decoded images of `decoded` BT2 px before they shrink, so that no pixel is skipped."""
    if shrink.max(initial=0) <= _HALVE_BEYOND:
        return np.zeros(shrink.shape, np.int64)
    wanted = np.ceil(np.log2(np.maximum(shrink / _HALVE_BEYOND, 1)))
    possible = np.floor(np.log2(decoded.min(axis=-1)))
    times: NDArray[np.int64] = np.minimum(wanted, possible).astype(np.int64)
    return times


def map_boxes(matrices: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounds ...4 (xyxy) of boxes ...4 (xyxy) after projective maps ...33, whose horizons they do not reach."""
    mapped = _mapped_corners(matrices, boxes)
    return np.concatenate([mapped.min(axis=-1), mapped.max(axis=-1)], axis=-1)


def map_boxes_within(
    matrices: NDArray[np.float64], boxes: NDArray[np.float64], rectangles: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bounds M4 (xyxy) of what mapped boxes M4, which are quads, share with rectangles M4; a point where it is nothing.

    The bounds of a turned box, cut to the rectangle, would reach to where only the rest of the box has been.
    """
    starts = np.moveaxis(_mapped_corners(matrices, boxes), -1, -2)  # M42
    along = np.roll(starts, -1, axis=1) - starts
    low, high = rectangles[:, None, :2], rectangles[:, None, 2:]
    # The part of each side within the rectangle, as shares of the side (Liang, Barsky: A New Concept and Method for
    # Line Clipping, ACM Transactions on Graphics 3, 1984).
    level = along == 0
    with np.errstate(over="ignore"):  # of sides that are all but level
        crossings = np.stack([low - starts, high - starts]) / np.where(level, 1, along)
    beside = np.where((starts >= low) & (starts <= high), -np.inf, np.inf)
    enter = np.where(level, beside, crossings.min(axis=0)).max(axis=-1, keepdims=True)
    leave = np.where(level, -beside, crossings.max(axis=0)).min(axis=-1, keepdims=True)
    enter, leave = np.maximum(enter, 0), np.minimum(leave, 1)
    seen: NDArray[np.bool_] = np.asarray(enter <= leave)
    ends = [starts + np.where(seen, share, 0) * along for share in (enter, leave)]
    # And the corners of the rectangle within the quad: on one and the same side of all of its sides.
    corners = np.stack([rectangles[:, [0, 2, 2, 0]], rectangles[:, [1, 1, 3, 3]]], axis=-1)
    offsets = corners[:, :, None] - starts[:, None]
    turns = along[:, None, :, 0] * offsets[..., 1] - along[:, None, :, 1] * offsets[..., 0]
    on_one_side = np.stack([turns >= 0, turns <= 0]).all(axis=-1).any(axis=0)
    within = np.asarray(on_one_side & turns.any(axis=-1))  # a box that is a point has no inside
    points = np.concatenate([*ends, corners], axis=1)
    there = np.concatenate([seen, seen, within[..., None]], axis=1)
    nearest = _within(starts.mean(axis=1), rectangles[:, :2], rectangles[:, 2:])
    nothing = ~there.any(axis=1)
    first = np.where(nothing, nearest, np.where(there, points, np.inf).min(axis=1))
    last = np.where(nothing, nearest, np.where(there, points, -np.inf).max(axis=1))
    return np.concatenate([first, last], axis=1)


def _mapped_corners(matrices: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Corners ...24 (x, y; one after the other around it) of boxes ...4 (xyxy) after projective maps ...33."""
    x, y = boxes[..., [0, 2, 2, 0]], boxes[..., [1, 1, 3, 3]]
    mapped = matrices[..., :2, 0, None] * x[..., None, :] + matrices[..., :2, 1, None] * y[..., None, :]
    mapped += matrices[..., :2, 2, None]
    if matrices[..., 2, :2].any():
        depth = matrices[..., 2, 0, None] * x + matrices[..., 2, 1, None] * y + matrices[..., 2, 2, None]
        mapped /= depth[..., None, :]
    return np.asarray(mapped)


def map_points(matrix: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Points P2 after a projective map 33."""
    mapped: NDArray[np.float64] = points @ matrix[:, :2].T + matrix[:, 2]
    return mapped[:, :2] / mapped[:, 2:]
