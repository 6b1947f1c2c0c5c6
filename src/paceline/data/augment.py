"""Augment: where every pixel and box of a training picture comes from, as numbers; no pixels here.

    source images          canvas, 2 x 2 of the network's input      output, 1 x 1

    [ 0 ]  [ 1 ]   ratio   +-------+---+      zoom, rotate, shear    +------+
    [ 2 ]  [ 3 ]  ------>  |   0   | 1 |     ---------------------> |  0 |1|   flips are folded into the matrix
                           +-------+---+      about the centre,      |----+-|
                           |   2   | 3 |      then shift             |  2 |3|
                           +-------+---+                             +------+

Each image's long side is scaled to the input's side; mosaic lays four of them around a random point of the canvas,
else one lies in the middle of a 1 x 1 canvas. A tile is the part of one source image that is seen.

Where nothing is rotated or sheared the map is snapped: whole source pixels to whole output pixels, so that a plain
resize writes the tile into its place. The matrix is that of the snapped map, so boxes follow the pixels exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.draws import uniforms

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig

_HALVE_BEYOND = 1.6
_MIN_SIDE_PX, _MIN_AREA_SHARE, _MAX_ASPECT = 2.0, 0.1, 100.0


class Slot(IntEnum):
    """What each random number of a sample decides; a new slot at the end changes none of the others."""

    MOSAIC = 0
    CENTRE_X = 1
    CENTRE_Y = 2
    PARTNER_1 = 3
    PARTNER_2 = 4
    PARTNER_3 = 5
    ZOOM = 6
    ANGLE = 7
    SHEAR_X = 8
    SHEAR_Y = 9
    SHIFT_X = 10
    SHIFT_Y = 11
    FLIP_X = 12
    FLIP_Y = 13
    HUE = 14
    SATURATION = 15
    VALUE = 16


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """How B pictures of `size` x `size` pixels are made from up to T tiles each.

    Tiles are painted in their order. A tile's map takes homogeneous source pixels (x, y, 1) to output pixels, on
    coordinates whose integers are the edges of pixels. Rows are independent; `put` replaces one.
    """

    size: int
    aligned: bool
    """True where all maps are snapped: no rotation, no shear, no perspective."""
    samples: NDArray[np.int64]
    """B, the sample that each picture is drawn for."""
    sources: NDArray[np.int64]
    """BT, image of each tile; -1 where there is no tile or nothing of it is seen."""
    matrices: NDArray[np.float64]
    """BT33, homogeneous source pixels to output pixels; the last row is (0, 0, 1) but for perspective."""
    visible: NDArray[np.float64]
    """BT4, the seen part of the source, xyxy in source pixels; whole units of `units` where aligned."""
    places: NDArray[np.int64]
    """BT4, xyxy in output pixels: what the tile covers (aligned), or the bounds of it (else)."""
    reductions: NDArray[np.int64]
    """BT, source pixels per pixel of the decoded image, along each axis."""
    halvings: NDArray[np.int64]
    """BT, how many times the decoded image is halved before it is resampled."""
    flips: NDArray[np.bool_]
    """B2, mirrored along x, along y; already part of the matrices."""
    hsv: NDArray[np.float64]
    """B3, hue shift in turns, gains of saturation and value."""
    layers: NDArray[np.int64]
    """BT, 0 where the tile is part of the picture, 1 where it is part of the second picture that is mixed in."""
    shares: NDArray[np.float64]
    """B, share of layer 0 in the final picture; 1 where there is nothing to mix. Colours change after the mixing."""
    clips: NDArray[np.int64]
    """BT4, xyxy in output pixels: the tile paints inside only."""
    masked: NDArray[np.bool_]
    """BT, the tile paints only the outlines of the objects that `picks` choose from its image."""
    picks: NDArray[np.uint64]
    """B, key of the numbers that choose objects."""
    grey: NDArray[np.bool_]
    """B, drained of colour, after `hsv`."""
    swaps: NDArray[np.int64]
    """B3, for each channel of the picture the one that it is taken from, after `hsv`; else 0, 1, 2."""

    def __len__(self) -> int:
        return len(self.samples)

    def put(self, row: int, other: Transforms) -> None:
        """Overwrite one row by the only row of `other`."""
        assert other.size == self.size
        assert other.aligned == self.aligned
        for name in _PER_PICTURE:
            vars(self)[name][row] = vars(other)[name][0]


_PER_PICTURE = tuple(field.name for field in fields(Transforms) if field.name not in ("size", "aligned"))


def draw(seed: int, passes: NDArray[np.int64], samples: NDArray[np.int64]) -> NDArray[np.float64]:
    """All random numbers of B samples, BS in [0, 1), by `Slot`."""
    return uniforms(seed, passes, samples, len(Slot))


def partners_of_all(draws: NDArray[np.float64], num_samples: int) -> NDArray[np.int64]:
    """Mosaic partners B3 from the whole set."""
    return (draws[:, Slot.PARTNER_1 : Slot.PARTNER_3 + 1] * num_samples).astype(np.int64)


def plan(
    config: AugmentConfig,
    size: int,
    draws: NDArray[np.float64],
    images: NDArray[np.int64],
    sizes: NDArray[np.integer[Any]],
    reductions: NDArray[np.int64],
    *,
    mosaic: bool,
) -> Transforms:
    """Turn random numbers BS into transforms.

    `images` B4 are the sample itself and its three mosaic partners; `sizes` B42 their (height, width) in pixels,
    `reductions` B4 how far they are reduced when they are decoded. Without `mosaic` the partners are not used.
    """
    extents = sizes[..., ::-1].astype(np.float64)  # (width, height), as x and y are
    grouped = (draws[:, Slot.MOSAIC] < config.mosaic) if mosaic else np.zeros(len(draws), dtype=np.bool_)
    ratios, corners, canvas = _lay_out(size, draws, extents, grouped)
    linear, offset = _affine(config, size, draws, canvas)
    flips = draws[:, [Slot.FLIP_X, Slot.FLIP_Y]] < (config.fliplr, config.flipud)
    present = np.ones(images.shape, dtype=np.bool_)
    present[~grouped, 1:] = False
    aligned = config.degrees == 0 and config.shear == 0
    place = _place_aligned if aligned else _place_turned
    matrices, visible, places, halvings = place(
        size, linear, offset, canvas, ratios, corners, extents, reductions.astype(np.int64)
    )
    present &= (places[..., 2:] > places[..., :2]).all(axis=-1)
    _mirror(size, flips, matrices, places)
    return Transforms(
        size=size,
        aligned=aligned,
        samples=images[:, 0].copy(),
        sources=np.where(present, images, -1),
        matrices=matrices,
        visible=visible,
        places=places,
        reductions=reductions.astype(np.int64),
        halvings=halvings,
        flips=flips,
        hsv=_hsv(config, draws),
        layers=np.zeros(images.shape, np.int64),
        shares=np.ones(len(draws)),
        clips=np.broadcast_to(np.array([0, 0, size, size]), places.shape).copy(),
        masked=np.zeros(images.shape, np.bool_),
        picks=np.zeros(len(draws), np.uint64),
        grey=np.zeros(len(draws), np.bool_),
        swaps=np.broadcast_to(np.arange(3), (len(draws), 3)).copy(),
    )


def _lay_out(
    size: int, draws: NDArray[np.float64], sizes: NDArray[np.float64], grouped: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Scale of each tile BT, its upper left corner BT2 on the canvas, and the canvas' side B."""
    ratios = size / sizes.max(axis=-1)
    scaled = sizes * ratios[..., None]
    canvas = np.where(grouped, 2.0 * size, float(size))
    centre = size * (0.5 + draws[:, [Slot.CENTRE_X, Slot.CENTRE_Y]])
    before = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])  # tiles that end at the centre along (x, y), not start there
    around = centre[:, None] - before * scaled
    middle = (canvas[:, None, None] - scaled) / 2
    return ratios, np.where(grouped[:, None, None], around, middle), canvas


def _affine(
    config: AugmentConfig, size: int, draws: NDArray[np.float64], canvas: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Map from canvas to output: linear part B22 and offset B2; zoom and rotation first, then shear, then shift."""
    both_ways = 2 * draws - 1
    zoom = 1 + config.scale * both_ways[:, Slot.ZOOM]
    angle = np.deg2rad(config.degrees * both_ways[:, Slot.ANGLE])
    cosine, sine = zoom * np.cos(angle), zoom * np.sin(angle)
    turn = np.stack([cosine, sine, -sine, cosine], axis=-1).reshape(-1, 2, 2)
    shear = np.tile(np.eye(2), (len(draws), 1, 1))
    shear[:, 0, 1] = np.tan(np.deg2rad(config.shear * both_ways[:, Slot.SHEAR_X]))
    shear[:, 1, 0] = np.tan(np.deg2rad(config.shear * both_ways[:, Slot.SHEAR_Y]))
    linear = shear @ turn
    target = size * (0.5 + config.translate * both_ways[:, [Slot.SHIFT_X, Slot.SHIFT_Y]])
    return linear, target - linear.sum(axis=2) * (canvas / 2)[:, None]


def _place_aligned(
    size: int,
    linear: NDArray[np.float64],
    offset: NDArray[np.float64],
    canvas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    corners: NDArray[np.float64],
    sizes: NDArray[np.float64],
    reductions: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Snap every tile: matrices BT33, visible BT4, places BT4, halvings BT (before flips)."""
    zoom = np.diagonal(linear, axis1=1, axis2=2)[:, None]  # B12
    scale = zoom * ratios[..., None]
    start = zoom * corners + offset[:, None]
    first, last = _canvas_bounds(canvas, corners, sizes * ratios[..., None])
    # Tiles share their borders on the canvas, so they share them after rounding too: no gap, no overlap.
    low = np.clip(np.rint(zoom * first + offset[:, None]), 0, size)
    high = np.clip(np.rint(zoom * last + offset[:, None]), 0, size)
    halvings = _halvings(1 / (scale[..., 0] * reductions), np.ceil(sizes / reductions[..., None]))
    unit = (reductions * 2**halvings)[..., None]
    limit = np.maximum(np.ceil(sizes / reductions[..., None]) // 2 ** halvings[..., None], 1)
    source_low = np.clip(np.rint((low - start) / scale / unit), 0, limit - 1)
    source_high = np.clip(np.rint((high - start) / scale / unit), source_low + 1, limit)
    source_low, source_high = source_low * unit, source_high * unit
    snapped = (high - low) / (source_high - source_low)
    matrices = np.zeros((*ratios.shape, 3, 3))
    matrices[..., 0, 0], matrices[..., 1, 1], matrices[..., 2, 2] = snapped[..., 0], snapped[..., 1], 1
    matrices[..., :2, 2] = low - source_low * snapped
    visible = np.concatenate([source_low, source_high], axis=-1)
    return matrices, visible, np.concatenate([low, high], axis=-1).astype(np.int64), halvings


def _place_turned(
    size: int,
    linear: NDArray[np.float64],
    offset: NDArray[np.float64],
    canvas: NDArray[np.float64],
    ratios: NDArray[np.float64],
    corners: NDArray[np.float64],
    sizes: NDArray[np.float64],
    reductions: NDArray[np.int64],
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Exact maps of every tile: matrices BT33, visible BT4, places BT4, halvings BT (before flips)."""
    matrices = np.zeros((*ratios.shape, 3, 3))
    matrices[..., :2, :2] = linear[:, None] * ratios[..., None, None]
    matrices[..., :2, 2] = np.einsum("bij,btj->bti", linear, corners) + offset[:, None]
    matrices[..., 2, 2] = 1
    first, last = _canvas_bounds(canvas, corners, sizes * ratios[..., None])
    visible = np.concatenate([first - corners, last - corners], axis=-1) / ratios[..., None]
    bounds = map_boxes(matrices, visible)
    places = np.concatenate([np.floor(bounds[..., :2]), np.ceil(bounds[..., 2:])], axis=-1)
    shrink = 1 / (np.sqrt(np.abs(np.linalg.det(matrices[..., :2, :2]))) * reductions)
    halvings = _halvings(shrink, np.ceil(sizes / reductions[..., None]))
    return matrices, visible, np.clip(places, 0, size).astype(np.int64), halvings


def _canvas_bounds(
    canvas: NDArray[np.float64], corners: NDArray[np.float64], scaled: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Upper left and lower right corners BT2 of the tiles on the canvas, cut at its border."""
    side = canvas[:, None, None]
    return np.clip(corners, 0, side), np.clip(corners + scaled, 0, side)


def _halvings(shrink: NDArray[np.float64], decoded: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count how often to halve decoded images of `decoded` BT2 px before they shrink, so that no pixel is skipped."""
    wanted = np.ceil(np.log2(np.maximum(shrink / _HALVE_BEYOND, 1)))
    possible = np.floor(np.log2(decoded.min(axis=-1)))
    times: NDArray[np.int64] = np.minimum(wanted, possible).astype(np.int64)
    return times


def _mirror(size: int, flips: NDArray[np.bool_], matrices: NDArray[np.float64], places: NDArray[np.int64]) -> None:
    """Fold flips B2 into matrices BT33 and places BT4, in place."""
    for axis in (0, 1):
        rows = flips[:, axis]
        matrices[rows, :, axis] = size * matrices[rows, :, 2] - matrices[rows, :, axis]
        places[rows, :, axis], places[rows, :, axis + 2] = (
            size - places[rows, :, axis + 2],
            size - places[rows, :, axis],
        )


def _hsv(config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    both_ways = 2 * draws[:, [Slot.HUE, Slot.SATURATION, Slot.VALUE]] - 1
    gains: NDArray[np.float64] = both_ways * (config.hsv_h, config.hsv_s, config.hsv_v) + (0.0, 1.0, 1.0)
    gains[:, 1:] = np.maximum(gains[:, 1:], 0)
    return gains


def map_boxes(matrices: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bounds ...4 (xyxy) of boxes ...4 (xyxy) after projective maps ...33, whose horizons they do not reach."""
    x, y = boxes[..., [0, 2, 0, 2]], boxes[..., [1, 1, 3, 3]]
    mapped = matrices[..., :2, 0, None] * x[..., None, :] + matrices[..., :2, 1, None] * y[..., None, :]
    mapped += matrices[..., :2, 2, None]
    if matrices[..., 2, :2].any():
        depth = matrices[..., 2, 0, None] * x + matrices[..., 2, 1, None] * y + matrices[..., 2, 2, None]
        mapped /= depth[..., None, :]
    return np.concatenate([mapped.min(axis=-1), mapped.max(axis=-1)], axis=-1)


def place_boxes(
    transforms: Transforms, rows: NDArray[np.int64], tiles: NDArray[np.int64], boxes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Map M source boxes M4 of tiles (`rows` M, `tiles` M) into their pictures.

    Returns xyxy output pixels M4, cut to what is seen, and M, True for boxes of which enough is left to learn from: two
    pixels along each side, more than a tenth of the area, no more than 100 times as long as wide.
    """
    matrices, visible = transforms.matrices[rows, tiles], transforms.visible[rows, tiles]
    whole = map_boxes(matrices, boxes)
    low, high = visible[:, [0, 1, 0, 1]], visible[:, [2, 3, 2, 3]]
    seen = np.clip(map_boxes(matrices, np.clip(boxes, low, high)), 0, transforms.size)
    sides = seen[:, 2:] - seen[:, :2]
    whole_area = np.prod(whole[:, 2:] - whole[:, :2], axis=-1)
    kept = (
        (sides.min(axis=-1, initial=np.inf) >= _MIN_SIDE_PX)
        & (np.prod(sides, axis=-1) > _MIN_AREA_SHARE * whole_area)
        & (sides.max(axis=-1, initial=0) < _MAX_ASPECT * sides.min(axis=-1, initial=np.inf))
    )
    return seen, kept
