"""Every augmentation moves boxes exactly as it moves pixels: rectangles are drawn and looked for in the picture.

Images of the first picture have their rectangle in red, those of the second in green, and the image that objects are
pasted from is blue all over, with the rectangle as its outline: so each channel shows one kind of edge.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.data import augment, paste, targets
from paceline.data.augment import GROUP, Transforms
from paceline.data.config import AugmentConfig
from paceline.data.index import Index, Strings
from paceline.data.plain import plain_of
from paceline.data.polygons import Polygons
from paceline.data.render import Workspace, render
from paceline.data.tiles import map_points

Pixels = NDArray[np.uint8]
SIZE = 224
SIZES = np.array([[160, 224], [300, 130], [97, 97], [333, 401]], np.int32)
BOXES = np.array([[57.0, 21, 171, 121], [19, 60, 100, 250], [20, 22, 80, 75], [60, 70, 330, 290]])
QUIET = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}


def index_of_rectangles() -> Index:
    """One rectangle in each image, which is its own outline."""
    rings = [np.array([box[[0, 1]], box[[2, 1]], box[[2, 3]], box[[0, 3]]]) for box in BOXES]
    return Index(
        names=("thing",),
        root=Path("/nowhere"),
        paths=Strings.of("abcd"),
        sizes=SIZES,
        orientation=np.ones(4, np.uint8),
        offsets=np.arange(5),
        boxes=BOXES,
        labels=np.arange(4, dtype=np.int32) % 1,
        crowd=np.zeros(4, bool),
        difficult=np.zeros(4, bool),
        area=np.ones(4),
        image_ids=np.arange(4),
        category_ids=np.zeros(1, np.int64),
        origins=np.arange(4),
        polygons=Polygons.of([ring] for ring in rings),
    )


INDEX = index_of_rectangles()


def plan(config: AugmentConfig, count: int, seed: int, reduction: int = 1) -> Transforms:
    samples = np.arange(count) % len(SIZES)
    draws = augment.draw(seed, np.arange(count), samples)
    partners = augment.partners_of_all(augment.partner_draws(config, draws), len(SIZES))
    images = np.concatenate([samples[:, None], partners], axis=1)
    reductions = np.full(images.shape, reduction)
    return augment.plan(config, SIZE, draws, images, SIZES[images], reductions, mosaic=True)


def decoded(number: int, channel: int, reduction: int) -> Pixels:
    """An image as the decoder would give it: reduced by averages over whole blocks."""
    height, width = SIZES[number].tolist()
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = BOXES[number].astype(int).tolist()
    if channel < 2:
        image[top:bottom, left:right, channel] = 255
    else:
        image[..., channel] = 255
    shape = -(-width // reduction), -(-height // reduction)
    missing = shape[1] * reduction - height, shape[0] * reduction - width
    image = cv2.copyMakeBorder(image, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
    return cv2.resize(image, shape, interpolation=cv2.INTER_AREA)


def channel_of(transforms: Transforms, row: int, tile: int) -> int:
    return 2 if transforms.masked[row, tile] else int(tile >= GROUP)


def draw(transforms: Transforms, row: int) -> Pixels:
    out = np.full((SIZE, SIZE, 3), 77, np.uint8)
    images = [
        decoded(number, channel_of(transforms, row, tile), int(transforms.reductions[row, tile]))
        if number >= 0
        else None
        for tile, number in enumerate(transforms.sources[row].tolist())
    ]
    masks = partial(paste.masks, INDEX, transforms)
    plain = plain_of(transforms)
    render(transforms, range(row, row + 1), [images], Workspace(SIZE), out[None], plain=plain, masks=masks)
    return out


def only(transforms: Transforms, row: int, tiles: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The picture of some tiles alone, not blended with anything, from 0 to 1."""
    sources = np.where(tiles, transforms.sources, -1)
    alone = dataclasses.replace(transforms, sources=sources, shares=np.ones(len(transforms)))
    return draw(alone, row) / 255


def sides(transforms: Transforms, row: int, tile: int, values: NDArray[np.float32]) -> list[NDArray[np.float64]]:
    """For each side of a tile's rectangle the distances in px, along it, from where it should be to where it is drawn.

    Only points are looked at around which nothing else is painted, and sides with more than five of these.
    """
    box, matrix = BOXES[transforms.sources[row, tile]], transforms.matrices[row, tile]
    visible = transforms.visible[row, tile]
    middle = map_points(matrix, (box[None, :2] + box[None, 2:]) / 2)[0]
    found = []
    for axis, end in ((0, 0), (0, 2), (1, 1), (1, 3)):
        along = np.linspace(box[1 - axis], box[3 - axis], 60)[8:-8]
        points = np.empty((len(along), 2))
        points[:, axis], points[:, 1 - axis] = box[end], along
        mapped = map_points(matrix, points)
        direction = mapped[-1] - mapped[0]
        length = np.linalg.norm(direction)
        if length < 12:
            continue
        normal = np.array([-direction[1], direction[0]]) / length
        depth = (middle - mapped[0]) @ normal
        if abs(depth) < 6:  # too thin to have an inside of 4 px everywhere
            continue
        normal *= np.sign(depth)
        steps = np.linspace(-3, 3, 121)
        probes = mapped[:, None] + steps[:, None] * normal
        inside = free(transforms, row, tile, probes)
        inside &= ((points >= visible[:2]) & (points <= visible[2:])).all(axis=1)
        if inside.sum() > 5:
            maps = (probes[inside] - 0.5).astype(np.float32)
            profile = cv2.remap(values, maps[..., 0], maps[..., 1], cv2.INTER_LINEAR)
            # Dark outside, bright inside: the brightness missing from the profile is where the edge lies.
            found.append(3 - np.clip(profile, 0, 1).sum(axis=1) * (steps[1] - steps[0]))
    return found


def free(transforms: Transforms, row: int, tile: int, probes: NDArray[np.float64]) -> NDArray[np.bool_]:
    """P, where all probes PS2 lie well within what a tile paints, and no later tile paints over them."""
    margin = 2.5
    good = ((probes > margin) & (probes < SIZE - margin)).all(axis=(1, 2))
    back = map_points(np.linalg.inv(transforms.matrices[row, tile]), probes.reshape(-1, 2)).reshape(probes.shape)
    visible = transforms.visible[row, tile]
    grain = np.abs(np.diff(back, axis=1)).max() / 0.05 * 2 + 1  # source pixels per output pixel, and a bit
    good &= ((back > visible[:2] + grain) & (back < visible[2:] - grain)).all(axis=(1, 2))
    clip, cut = transforms.clips[row, tile], transforms.cuts[row]
    good &= ((probes > clip[:2] + margin) & (probes < clip[2:] - margin)).all(axis=(1, 2))
    if tile < GROUP and cut[2] > 0:
        good &= ~((probes > cut[:2] - margin) & (probes < cut[2:] + margin)).all(axis=2).any(axis=1)
    for other in np.flatnonzero(transforms.masked[row] & (transforms.sources[row] >= 0)).tolist():
        if other != tile and transforms.layers[row, tile] == 0:
            for _, rings in paste.outlines(INDEX, transforms, row, other):
                points = np.concatenate(rings)
                low, high = points.min(axis=0) - margin, points.max(axis=0) + margin
                good &= ~((probes > low) & (probes < high)).all(axis=2).any(axis=1)
    return good


def check(config: AugmentConfig, count: int, seed: int, reduction: int = 1) -> list[int]:
    """Check all sides of all pictures, and count them by channel."""
    transforms = plan(config, count, seed, reduction)
    counts = [0, 0, 0]
    for row in range(count):
        layers = [only(transforms, row, transforms.layers == layer) for layer in (0, 1)]
        share = transforms.shares[row]
        blended = share * layers[0] + (1 - share) * layers[1]
        assert np.abs(blended - draw(transforms, row) / 255).max() < 1.01 / 255
        for tile in np.flatnonzero(transforms.sources[row] >= 0).tolist():
            channel = channel_of(transforms, row, tile)
            values = layers[transforms.layers[row, tile]][..., channel]
            if channel == 2:  # what has changed since before it was pasted
                below = only(transforms, row, (transforms.layers == 0) & ~transforms.masked)[..., 2]
                values = (values - below) / (1 - below)
            # A reduced image is coarser than its source; the law is stated in pixels of what is drawn from.
            scale = np.sqrt(abs(np.linalg.det(transforms.matrices[row, tile, :2, :2]))) * reduction
            for offsets in sides(transforms, row, tile, values.astype(np.float32)):
                counts[channel] += 1
                assert abs(offsets.mean()) < 0.6 * max(scale, 1)
                assert np.quantile(np.abs(offsets), 0.9) < 0.6 * max(scale, 1)
    return counts


ALONE = {
    "plain": {},
    "zoom": {"scale": 0.5, "translate": 0.1},
    "flips": {"fliplr": 0.5, "flipud": 0.5},
    "degrees": {"degrees": 45.0},
    "shear": {"shear": 15.0},
    "perspective": {"perspective": 0.001},
    "mosaic": {"mosaic": 1.0},
    "mixup": {"mixup": 1.0},
    "cutmix": {"cutmix": 1.0},
    "copy_paste": {"copy_paste": 1.0},
}
STILL = {"scale": 0.0, "translate": 0.0, "fliplr": 0.0, "mosaic": 0.0}


@pytest.mark.parametrize("name", ALONE)
def test_each_alone(name: str) -> None:
    counts = check(AugmentConfig(**(QUIET | STILL | ALONE[name])), 24, seed=0)  # type: ignore[arg-type]
    assert counts[0] > 30
    assert (counts[1] > 20) == (name in ("mixup", "cutmix"))
    assert (counts[2] > 30) == (name == "copy_paste")


@pytest.mark.parametrize("turned", [False, True])
def test_all_together(turned: bool) -> None:
    turn = {"degrees": 20.0, "shear": 5.0, "perspective": 0.0005} if turned else {}
    config = AugmentConfig(flipud=0.5, mosaic=0.5, mixup=0.3, cutmix=0.7, copy_paste=0.7, **(QUIET | turn))  # type: ignore[arg-type]
    counts = check(config, 40, seed=1)
    assert min(counts) > 20


shares = st.sampled_from([0.0, 0.5, 1.0])


@settings(max_examples=40, deadline=None)
@given(
    config=st.builds(
        AugmentConfig,
        hsv_h=st.just(0.0),
        hsv_s=st.just(0.0),
        hsv_v=st.just(0.0),
        degrees=st.sampled_from([0.0, 10.0, 180.0]),
        shear=st.sampled_from([0.0, 10.0]),
        perspective=st.sampled_from([0.0, 0.0003, 0.001]),
        scale=st.sampled_from([0.0, 0.3, 0.5]),
        translate=st.sampled_from([0.0, 0.2]),
        fliplr=shares,
        flipud=shares,
        mosaic=shares,
        mixup=shares,
        cutmix=shares,
        copy_paste=shares,
    ),
    reduction=st.sampled_from([1, 2]),
    seed=st.integers(0, 10**6),
)
def test_any_mixture(config: AugmentConfig, reduction: int, seed: int) -> None:
    check(config, 3, seed, reduction)


def test_pasted_boxes_are_the_bounds_of_what_is_drawn() -> None:
    """What is more than half opaque fills its box, up to the half pixel that pixels cannot show and the outline's."""
    config = AugmentConfig(copy_paste=1.0, scale=0.3, mosaic=0, **QUIET)  # type: ignore[arg-type]
    transforms = plan(config, 40, seed=4)
    pictures, boxes, _ = targets.transformed(INDEX, transforms)
    for row in range(40):
        below = only(transforms, row, ~transforms.masked)[..., 2]
        opacity = (draw(transforms, row)[..., 2] / 255 - below) / (1 - below)
        ys, xs = np.nonzero(opacity > 0.5)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(boxes[pictures == row] - drawn).max(axis=1).min() <= 0.75


def test_turned_boxes_are_the_bounds_of_what_is_seen_of_them() -> None:
    """Also where a picture's edge cuts them, beyond which the rest of the box reaches farther."""
    config = AugmentConfig(degrees=45.0, shear=10.0, scale=0.5, translate=0.4, mosaic=0.0, **QUIET)  # type: ignore[arg-type]
    transforms = plan(config, 80, seed=2)
    pictures, boxes, _ = targets.transformed(INDEX, transforms)
    num_cut = 0
    for row, box in zip(pictures.tolist(), boxes, strict=True):
        ys, xs = np.nonzero(draw(transforms, row)[..., 0] > 127)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(box - drawn).max() < 1.6  # a corner's tip fills less than half of its pixels
        num_cut += bool((box < 0.5).any() or (box > SIZE - 0.5).any())
    assert num_cut > 20


@pytest.mark.parametrize("turn", [{}, {"degrees": 45.0}], ids=["aligned", "turned"])
def test_pasted_boxes_of_any_outline_are_the_bounds_of_what_is_seen(turn: dict[str, float]) -> None:
    rings = [np.array([[box[0], box[1]], [box[2], box[1]], [box[0], box[3]]]) for box in BOXES]
    index = dataclasses.replace(INDEX, polygons=Polygons.of([ring] for ring in rings))
    config = AugmentConfig(copy_paste=1.0, scale=0.5, translate=0.4, mosaic=0, **QUIET, **turn)  # type: ignore[arg-type]
    transforms = plan(config, 60, seed=5)
    pictures, boxes, _ = targets.transformed(index, transforms)
    num_cut = 0
    for row in range(60):
        alone = dataclasses.replace(transforms, sources=np.where(transforms.masked, transforms.sources, -1))
        images = [decoded(n, 2, 1) if n >= 0 else None for n in alone.sources[row].tolist()]
        out = np.empty((1, SIZE, SIZE, 3), np.uint8)
        masks = partial(paste.masks, index, alone)
        if not any(image is not None for image in images):
            continue
        render(alone, range(row, row + 1), [images], Workspace(SIZE), out, plain=plain_of(alone), masks=masks)
        drawn = []
        for least in (130, 185):  # a little blue in grey, where edges are smooth; half of it, where tips are thin
            ys, xs = np.nonzero(out[0, ..., 2] > least)
            drawn.append([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        for box in targets.transformed(index, alone.row(row))[1]:
            assert np.abs(box - drawn).min(axis=0).max() < 1.5
            num_cut += bool((box < 0.5).any() or (box > SIZE - 0.5).any())
            assert np.abs(boxes[pictures == row] - box).max(axis=1).min() < 1e-9
    assert num_cut > 10
