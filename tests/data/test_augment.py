from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data import augment
from paceline.data.augment import Slot, Transforms, map_boxes, place_boxes
from paceline.data.config import AugmentConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

TURNED = AugmentConfig(degrees=30, shear=10, flipud=0.5)
STILL = AugmentConfig(scale=0, translate=0, fliplr=0, mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0)


def make(
    config: AugmentConfig,
    sizes: NDArray[np.int64],
    *,
    size: int = 320,
    count: int = 8,
    seed: int = 0,
    mosaic: bool = True,
    reduction: int = 1,
) -> Transforms:
    samples = np.arange(count) % len(sizes)
    draws = augment.draw(seed, np.arange(count), samples)
    images = np.concatenate(
        [samples[:, None], augment.partners_of_all(augment.partner_draws(config, draws), len(sizes))], axis=1
    )
    reductions = np.full(images.shape, reduction)
    return augment.plan(config, size, draws, images, sizes[images], reductions, mosaic=mosaic)


image_sizes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=6)


@settings(max_examples=80, deadline=None)
@given(sizes=image_sizes, seed=st.integers(0, 10**6), mosaic=st.booleans(), reduction=st.sampled_from([1, 2, 4]))
def test_snapped_tiles_map_whole_pixels_to_whole_pixels(
    sizes: list[tuple[int, int]], seed: int, mosaic: bool, reduction: int
) -> None:
    sizes_N2 = np.array(sizes)
    transforms = make(AugmentConfig(flipud=0.5), sizes_N2, seed=seed, mosaic=mosaic, reduction=reduction)
    assert transforms.aligned
    seen = transforms.sources >= 0
    places, visible = transforms.places[seen], transforms.visible[seen]
    unit = (transforms.reductions * 2**transforms.halvings)[seen][:, None]
    np.testing.assert_array_equal(visible % unit, 0)
    decoded = -(-sizes_N2[transforms.sources[seen]][:, ::-1] // reduction)
    assert (visible[:, :2] >= 0).all()
    assert (visible[:, 2:] > visible[:, :2]).all()
    assert (visible[:, 2:] / reduction <= decoded).all()
    assert (places >= 0).all()
    assert (places <= transforms.size).all()
    np.testing.assert_allclose(map_boxes(transforms.matrices[seen], visible), places, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(sizes=image_sizes, seed=st.integers(0, 10**6))
def test_tiles_of_a_mosaic_meet_without_overlap(sizes: list[tuple[int, int]], seed: int) -> None:
    transforms = make(AugmentConfig(flipud=0.5), np.array(sizes), seed=seed)
    for row in range(len(transforms)):
        times = np.zeros((transforms.size, transforms.size), int)
        for tile in np.flatnonzero(transforms.sources[row] >= 0):
            left, top, right, bottom = transforms.places[row, tile]
            times[top:bottom, left:right] += 1
        assert times.max(initial=0) <= 1


def test_a_mosaic_of_full_tiles_leaves_no_gap() -> None:
    """Square images fill the canvas around its centre: all that is seen there is covered."""
    config = AugmentConfig(scale=0, translate=0)
    transforms = make(config, np.array([[100, 100]]), count=64)
    areas = np.prod(transforms.places[..., 2:] - transforms.places[..., :2], axis=-1)
    covered = np.where(transforms.sources >= 0, areas, 0).sum(axis=1)
    np.testing.assert_array_equal(covered, transforms.size**2)


@pytest.mark.parametrize("config", [AugmentConfig(), TURNED])
def test_a_batch_is_its_samples_one_by_one(config: AugmentConfig) -> None:
    sizes = np.array([[480, 640], [300, 200], [50, 900]])
    samples, passes = np.array([2, 0, 1, 1]), np.array([0, 0, 4, 5])
    draws = augment.draw(3, passes, samples)
    images = np.concatenate(
        [samples[:, None], augment.partners_of_all(augment.partner_draws(config, draws), 3)], axis=1
    )
    ones = np.ones(images.shape, np.int64)
    together = augment.plan(config, 320, draws, images, sizes[images], ones, mosaic=True)
    rebuilt = augment.plan(config, 320, draws[::-1], images[::-1], sizes[images[::-1]], ones, mosaic=True)
    for row in range(4):
        rows = slice(row, row + 1)
        alone = augment.plan(config, 320, draws[rows], images[rows], sizes[images[rows]], ones[rows], mosaic=True)
        rebuilt.put(row, alone)
        np.testing.assert_array_equal(alone.matrices[0], together.matrices[row])
    for field in dataclasses.fields(Transforms):
        np.testing.assert_array_equal(getattr(rebuilt, field.name), getattr(together, field.name))


def test_without_augmentation_it_is_the_letterbox() -> None:
    transforms = make(STILL, np.array([[240, 480]]), count=1)
    assert transforms.sources.tolist() == [[0, -1, -1, -1]]
    assert transforms.places[0, 0].tolist() == [0, 80, 320, 240]
    np.testing.assert_allclose(transforms.matrices[0, 0], [[2 / 3, 0, 0], [0, 2 / 3, 80], [0, 0, 1]], atol=1e-12)


@pytest.mark.parametrize("config", [AugmentConfig(), TURNED])
@pytest.mark.parametrize("axis", [0, 1])
def test_flips_mirror_everything(config: AugmentConfig, axis: int) -> None:
    sizes = np.array([[480, 640], [300, 200]])
    never = dataclasses.replace(config, fliplr=0.0, flipud=0.0)
    always = dataclasses.replace(never, **{("fliplr", "flipud")[axis]: 1.0})
    straight, mirrored = make(never, sizes), make(always, sizes)
    rows, tiles = np.nonzero(straight.sources >= 0)
    boxes = np.tile([20.0, 30.0, 120.0, 150.0], (len(rows), 1))
    expected, kept = place_boxes(straight, rows, tiles, boxes)
    expected[:, [axis, axis + 2]] = 320 - expected[:, [axis + 2, axis]]
    found, kept_too = place_boxes(mirrored, rows, tiles, boxes)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    np.testing.assert_array_equal(kept, kept_too)
    assert kept.any()


@settings(max_examples=60, deadline=None)
@given(sizes=image_sizes, seed=st.integers(0, 10**6), turned=st.booleans())
def test_kept_boxes_are_whole_enough(sizes: list[tuple[int, int]], seed: int, turned: bool) -> None:
    sizes_N2 = np.array(sizes)
    transforms = make(TURNED if turned else AugmentConfig(), sizes_N2, seed=seed)
    rows, tiles = np.nonzero(transforms.sources >= 0)
    height, width = sizes_N2[transforms.sources[rows, tiles]].T.astype(float)
    start, end = np.random.default_rng(seed).random((2, len(rows), 2)) * np.stack([width, height], 1)
    boxes = np.concatenate([np.minimum(start, end), np.maximum(start, end)], axis=1)
    placed, kept = place_boxes(transforms, rows, tiles, boxes)
    sides = (placed[:, 2:] - placed[:, :2])[kept]
    assert (placed >= 0).all()
    assert (placed <= transforms.size).all()
    assert (sides >= 2).all()
    whole = map_boxes(transforms.matrices[rows, tiles], boxes)[kept]
    assert (sides.prod(axis=1) > 0.1 * (whole[:, 2:] - whole[:, :2]).prod(axis=1)).all()
    if not turned:
        assert (placed[:, :2] >= transforms.places[rows, tiles][:, :2] - 1e-6).all()
        assert (placed[:, 2:] <= transforms.places[rows, tiles][:, 2:] + 1e-6).all()


def test_boxes_that_lose_too_much_go() -> None:
    transforms = make(STILL, np.array([[320, 320]]), count=1)
    boxes = np.array([[10, 10, 50, 50], [10, 10, 11.9, 50], [10, 10, 310, 12.9], [-200, 10, 21, 50], [-2, 5, 8, 9]])
    nothing = np.zeros(5, np.int64)
    placed, kept = place_boxes(transforms, nothing, nothing, boxes.astype(float))
    assert kept.tolist() == [True, False, False, False, True]
    np.testing.assert_allclose(placed[4], [0, 5, 8, 9], atol=1e-9)


def test_strengths_are_those_of_the_config() -> None:
    config = AugmentConfig(hsv_h=0.1, hsv_s=0.5, hsv_v=0.2, scale=0.3, degrees=0)
    transforms = make(config, np.array([[320, 320]]), count=2000, mosaic=False)
    np.testing.assert_allclose(np.abs(transforms.hsv - (0, 1, 1)).max(axis=0), [0.1, 0.5, 0.2], rtol=0.01)
    zoom = transforms.matrices[:, 0, 1, 1]
    assert 0.69 < zoom.min() < 0.72
    assert 1.28 < zoom.max() < 1.31
    assert abs(transforms.flips[:, 0].mean() - 0.5) < 0.05
    assert not transforms.flips[:, 1].any()


def test_mosaic_has_its_probability() -> None:
    sizes = np.array([[320, 320]])
    config = AugmentConfig(mosaic=0.25, scale=0, translate=0)
    grouped = (make(config, sizes, count=2000).sources[:, 1:] >= 0).any(axis=1)
    assert abs(grouped.mean() - 0.25) < 0.04
    assert not (make(AugmentConfig(), sizes, mosaic=False).sources[:, 1:] >= 0).any()


def test_slots_are_a_fixed_order() -> None:
    assert [slot.value for slot in Slot] == list(range(len(Slot)))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AugmentConfig(), 2533147285),
        (AugmentConfig(flipud=0.5, mosaic=0.5), 871539505),
        (AugmentConfig(mosaic=0), 223705285),
        (AugmentConfig(degrees=20, shear=5), 3866391193),
    ],
    ids=["default", "flips", "single", "turned"],
)
def test_pictures_stay_what_they_were(config: AugmentConfig, expected: int) -> None:
    """Checksums of the pictures of the first release, to a thousandth of a pixel."""
    sizes = np.random.default_rng(0).integers(30, 1500, (50, 2))
    transforms = make(config, sizes, count=64, seed=3, reduction=2)
    assert checksum(transforms) == expected


def test_what_is_off_is_neutral() -> None:
    transforms = make(AugmentConfig(), np.array([[300, 200]]))
    assert transforms.sources.shape == (8, 4)
    assert not transforms.layers.any()
    assert (transforms.shares == 1).all()
    assert (transforms.clips == (0, 0, 320, 320)).all()
    assert not transforms.cuts.any()
    assert not transforms.masked.any()
    assert not transforms.grey.any()
    assert (transforms.swaps == (0, 1, 2)).all()
    assert (transforms.matrices[:, :, 2] == (0, 0, 1)).all()


@pytest.mark.parametrize("turn", [0.0, 15.0])
def test_further_pictures_change_nothing_of_the_first(turn: float) -> None:
    """With everything that can be mixed or pasted, the first four tiles are those that there are without."""
    sizes = np.random.default_rng(0).integers(30, 900, (9, 2))
    plain = AugmentConfig(degrees=turn, mosaic=0.5)
    mixed = dataclasses.replace(plain, mixup=0.3, cutmix=0.5, copy_paste=0.5, greyscale=0.3, bgr=0.3)
    few, many = make(plain, sizes, count=64), make(mixed, sizes, count=64)
    assert many.sources.shape == (64, 9)
    for name in ("sources", "matrices", "visible", "places", "reductions", "halvings", "layers", "clips"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name)[:, :4])
    for name in ("samples", "flips", "hsv"):
        np.testing.assert_array_equal(getattr(few, name), getattr(many, name))
    second = (many.sources[:, 4:8] >= 0).any(axis=1)
    blended, cut = many.shares < 1, many.cuts.any(axis=1)
    assert not (second & ~(blended | cut)).any()
    assert (many.layers[:, 4:8].any(axis=1) == blended).all()
    assert min(blended.sum(), cut.sum(), many.masked[:, 8].sum(), many.grey.sum()) > 5
    assert not make(mixed, sizes, count=64, mosaic=False).sources[:, 1:].max() >= 0


def checksum(transforms: Transforms) -> int:
    """Of all that decides about pixels and boxes, for the tiles that are seen."""
    seen = transforms.sources >= 0
    decisive = (
        transforms.sources,
        np.rint(transforms.matrices[seen][:, :2] * 1e3).astype(np.int64),
        np.rint(transforms.visible[seen] * 1e3).astype(np.int64),
        transforms.places[seen],
        transforms.halvings[seen],
        transforms.flips,
        np.rint(transforms.hsv * 1e6).astype(np.int64),
    )
    return zlib.crc32(b"".join(np.ascontiguousarray(array).tobytes() for array in decisive))
