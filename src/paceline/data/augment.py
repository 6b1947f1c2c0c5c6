"""Augment: what every pixel and box of a training picture is made from, as numbers; no pixels here.

A picture is one image or a mosaic of four (`tiles`), joined, where `mixing` says so, by a second picture of the same
kind, and by objects that are pasted into it (`paste`). All random numbers hang on (seed, pass, sample).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.draws import keys, numbers, uniforms
from paceline.data.mixing import mix, trim
from paceline.data.slots import Slot
from paceline.data.tiles import Tiles, is_aligned, lay_tiles, map_boxes, map_boxes_within, mirror

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig

__all__ = ["Slot", "Transforms", "draw", "map_boxes", "partner_draws", "partners_of_all", "place_boxes", "plan"]

GROUP = 4
"""Tiles of a mosaic."""
_MIN_SIDE_PX, _MIN_AREA_SHARE, _MAX_ASPECT = 2.0, 0.1, 100.0


@dataclass(frozen=True, kw_only=True)
class Transforms:
    """How B pictures of `size` x `size` pixels are made from up to T tiles each.

    Tiles are painted in their order: 0 to 3 make the picture; where a second one can be mixed in, 4 to 7 make that;
    where objects can be pasted, the last tile has them. What no tile paints is grey. A tile's map takes homogeneous
    source pixels (x, y, 1) to output pixels, on coordinates whose integers are the edges of pixels. Rows are
    independent; `put` replaces one.
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
    """BT4, xyxy in output pixels: the tile paints inside only; `cuts` for the tiles of a picture that is cut in."""
    cuts: NDArray[np.int64]
    """B4, xyxy in output pixels: the rectangle of a second picture, in which the first paints nothing; else zeros."""
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

    def row(self, row: int) -> Transforms:
        """Return one picture alone."""
        return replace(self, **{name: vars(self)[name][row : row + 1] for name in _PER_PICTURE})

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


def num_tiles(config: AugmentConfig) -> int:
    """Count the tiles of a picture: a mosaic, a second one where pictures may be mixed, and one to paste objects."""
    return GROUP + GROUP * _mixes(config) + (config.copy_paste > 0)


def partner_draws(config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """Numbers in [0, 1) that choose the images of all tiles but the first, by numbers BS; one less than there are."""
    chosen = [draws[:, Slot.PARTNER_1 : Slot.PARTNER_3 + 1]]
    if _mixes(config):
        second = _further(draws, Slot.SECOND)
        chosen += [second[:, [Slot.SAMPLE]], second[:, Slot.PARTNER_1 : Slot.PARTNER_3 + 1]]
    if config.copy_paste > 0:
        chosen.append(_further(draws, Slot.PASTED)[:, [Slot.SAMPLE]])
    return np.concatenate(chosen, axis=1) if len(chosen) > 1 else chosen[0]


def partners_of_all(chosen: NDArray[np.float64], num_samples: int) -> NDArray[np.int64]:
    """Take partners from the whole set by numbers in [0, 1) of any shape."""
    return (chosen * num_samples).astype(np.int64)


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

    `images` BT are the sample itself and its partners (`partner_draws`); `sizes` BT2 their (height, width) in pixels,
    `reductions` BT how far they are reduced when they are decoded. Without `mosaic` the partners are not used: nothing
    is mixed or pasted either.
    """
    assert images.shape[1] == num_tiles(config)
    count, reductions = len(draws), reductions.astype(np.int64, copy=False)
    nobody, base = np.zeros(count, np.bool_), slice(0, GROUP)
    grouped = draws[:, Slot.MOSAIC] < config.mosaic if mosaic else nobody
    tiles = lay_tiles(config, size, draws, sizes[:, base], reductions[:, base], grouped)
    matrices, visible, places, halvings, present = (
        tiles.matrices,
        tiles.visible,
        tiles.places,
        tiles.halvings,
        tiles.present,
    )
    layers, masked = np.zeros(images.shape, np.int64), np.zeros(images.shape, np.bool_)
    clips = np.empty((*images.shape, 4), np.int64)
    clips[...] = (0, 0, size, size)
    shares, cuts, picks = np.ones(count), np.zeros((count, 4), np.int64), np.zeros(count, np.uint64)
    if images.shape[1] > GROUP:
        matrices, visible, places, halvings, present = _widen(tiles, images.shape[1])
        everything = (matrices, visible, places, halvings, present)
        if _mixes(config) and mosaic:
            mixing, second = mix(config, size, draws), slice(GROUP, 2 * GROUP)
            shares, cuts = mixing.shares, mixing.cuts
            rows = np.flatnonzero(mixing.mixed | mixing.cut)
            if len(rows):
                own = _further(draws[rows], Slot.SECOND)
                together = own[:, Slot.MOSAIC] < config.mosaic
                added = lay_tiles(config, size, own, sizes[rows, second], reductions[rows, second], together)
                _insert(everything, added, rows, second)
                layers[mixing.mixed, second] = 1
                clips[mixing.cut, second] = cuts[mixing.cut, None]
        if config.copy_paste > 0 and mosaic:
            rows = np.flatnonzero(draws[:, Slot.COPY_PASTE] < config.copy_paste)
            if len(rows):
                last = slice(images.shape[1] - 1, None)
                own = _further(draws[rows], Slot.PASTED)
                added = lay_tiles(config, size, own, sizes[rows, last], reductions[rows, last], nobody[rows])
                _insert(everything, added, rows, last)
                masked[rows, last] = True
                picks[rows] = keys(own[:, Slot.PASTED])
    flips = draws[:, Slot.FLIP_X : Slot.FLIP_Y + 1] < (config.fliplr, config.flipud)
    mirror(size, flips, matrices, places)
    if images.shape[1] > GROUP:
        present &= _overlap(places, clips)
    swaps = np.empty((count, 3), np.int64)
    swaps[...] = (0, 1, 2)
    if config.bgr > 0:
        swaps[draws[:, Slot.SWAP] < config.bgr] = (2, 1, 0)
    return Transforms(
        size=size,
        aligned=is_aligned(config),
        samples=images[:, 0].copy(),
        sources=np.where(present, images, -1),
        matrices=matrices,
        visible=visible,
        places=places,
        reductions=reductions,
        halvings=halvings,
        flips=flips,
        hsv=_hsv(config, draws),
        layers=layers,
        shares=shares,
        clips=clips,
        cuts=cuts,
        masked=masked,
        picks=picks,
        grey=draws[:, Slot.GREY] < config.greyscale,
        swaps=swaps,
    )


def _mixes(config: AugmentConfig) -> bool:
    return config.mixup > 0 or config.cutmix > 0


def _further(draws: NDArray[np.float64], slot: Slot) -> NDArray[np.float64]:
    """Numbers BS of a further picture, whose key is in `slot`."""
    return numbers(keys(draws[:, slot]), len(Slot))


def _widen(tiles: Tiles, width: int) -> tuple[NDArray[Any], ...]:
    """Matrices, visible, places, halvings and presence with room for more tiles, which are not there yet."""
    wide = []
    for array in (tiles.matrices, tiles.visible, tiles.places, tiles.halvings, tiles.present):
        room = np.zeros((len(array), width, *array.shape[2:]), array.dtype)
        room[:, :GROUP] = array
        wide.append(room)
    wide[0][:, GROUP:] = np.eye(3)
    return tuple(wide)


def _insert(into: tuple[NDArray[Any], ...], tiles: Tiles, rows: NDArray[np.int64], columns: slice) -> None:
    for array, part in zip(
        into, (tiles.matrices, tiles.visible, tiles.places, tiles.halvings, tiles.present), strict=True
    ):
        array[rows, columns] = part


def _overlap(places: NDArray[np.int64], clips: NDArray[np.int64]) -> NDArray[np.bool_]:
    """BT, tiles of which something lies within their clip."""
    low, high = np.maximum(places[..., :2], clips[..., :2]), np.minimum(places[..., 2:], clips[..., 2:])
    return np.asarray((high > low).all(axis=-1))


def _hsv(config: AugmentConfig, draws: NDArray[np.float64]) -> NDArray[np.float64]:
    both_ways = 2 * draws[:, Slot.HUE : Slot.VALUE + 1] - 1
    gains: NDArray[np.float64] = both_ways * (config.hsv_h, config.hsv_s, config.hsv_v) + (0.0, 1.0, 1.0)
    np.maximum(gains[:, 1:], 0, out=gains[:, 1:])
    return gains


def place_boxes(
    transforms: Transforms, rows: NDArray[np.int64], tiles: NDArray[np.int64], boxes: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Map M source boxes M4 of tiles (`rows` M, `tiles` M) into their pictures.

    Returns xyxy output pixels M4, cut to what is seen, and M, True for boxes of which enough is left to learn from: two
    pixels along each side, more than a tenth of the area, no more than 100 times as long as wide.
    """
    matrices, visible = transforms.matrices[rows, tiles], transforms.visible[rows, tiles]
    inside = np.maximum(boxes, visible[:, [0, 1, 0, 1]])
    np.minimum(inside, visible[:, [2, 3, 2, 3]], out=inside)
    if transforms.aligned:
        scale, shift = matrices[:, [0, 1, 0, 1], [0, 1, 0, 1]], matrices[:, [0, 1, 0, 1], 2]
        seen = inside * scale + shift
        seen = np.concatenate([np.minimum(seen[:, :2], seen[:, 2:]), np.maximum(seen[:, :2], seen[:, 2:])], axis=1)
        sides = boxes[:, 2:] - boxes[:, :2]
        whole_area = sides[:, 0] * sides[:, 1] * np.abs(scale[:, 0] * scale[:, 1])
    else:
        seen = map_boxes(matrices, inside)
        whole_area = _whole_area(matrices, boxes, inside, seen)
        clips = transforms.clips[rows, tiles].astype(np.float64)
        across = np.flatnonzero((seen[:, :2] < clips[:, :2]).any(axis=1) | (seen[:, 2:] > clips[:, 2:]).any(axis=1))
        if len(across):
            seen[across] = map_boxes_within(matrices[across], inside[across], clips[across])
    np.maximum(seen, 0, out=seen)
    np.minimum(seen, transforms.size, out=seen)
    area = None
    if transforms.cuts.any():
        seen, area = _cut(transforms, rows, tiles, seen)
    return seen, enough(seen, whole_area, area)


def enough(
    seen: NDArray[np.float64], whole_area: NDArray[np.float64], area: NDArray[np.float64] | None = None
) -> NDArray[np.bool_]:
    """M, True for boxes M4 of which enough is left; `area` M is what is seen where that is less than the box."""
    sides = seen[:, 2:] - seen[:, :2]
    shorter, longer = np.minimum(sides[:, 0], sides[:, 1]), np.maximum(sides[:, 0], sides[:, 1])
    if area is None:
        area = shorter * longer
    kept = np.asarray(shorter >= _MIN_SIDE_PX)
    kept &= area > _MIN_AREA_SHARE * whole_area
    kept &= longer < _MAX_ASPECT * shorter
    return kept


def _whole_area(
    matrices: NDArray[np.float64],
    boxes: NDArray[np.float64],
    inside: NDArray[np.float64],
    seen: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Areas M that boxes M4 would have if nothing of them were cut.

    In perspective the whole of a box may reach beyond the horizon, so there the part that is inside is scaled up.
    """
    if not matrices[:, 2, :2].any():
        whole = map_boxes(matrices, boxes)
        affine: NDArray[np.float64] = (whole[:, 2] - whole[:, 0]) * (whole[:, 3] - whole[:, 1])
        return affine
    part, full = inside[:, 2:] - inside[:, :2], boxes[:, 2:] - boxes[:, :2]
    share = np.maximum(part[:, 0], 0) * np.maximum(part[:, 1], 0) / (full[:, 0] * full[:, 1])
    area = (seen[:, 2] - seen[:, 0]) * (seen[:, 3] - seen[:, 1])
    whole_area: NDArray[np.float64] = np.divide(area, share, out=np.full(len(boxes), np.inf), where=share > 0)
    return whole_area


def _cut(
    transforms: Transforms, rows: NDArray[np.int64], tiles: NDArray[np.int64], seen: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return what rectangles that are cut into pictures leave of boxes M4 (xyxy, px): bounds M4 and areas M."""
    first, clips = tiles < GROUP, transforms.clips[rows, tiles]
    low = np.minimum(np.maximum(seen, clips[:, [0, 1, 0, 1]]), clips[:, [2, 3, 2, 3]])
    trimmed, visible = trim(seen, transforms.cuts[rows])
    bounds = np.where(first[:, None], trimmed, low)
    area = np.where(first, visible, (low[:, 2] - low[:, 0]) * (low[:, 3] - low[:, 1]))
    return bounds, area
