"""Maps of tiles: identity, composition, flips, permutation, and perspective without its horizon."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from paceline.data import augment
from paceline.data.augment import place_boxes
from paceline.data.config import AugmentConfig
from paceline.data.plain import plain_of
from paceline.data.render import Workspace, render
from paceline.data.tiles import lay_tiles, map_boxes, map_boxes_within, map_points, mirror

if TYPE_CHECKING:
    from numpy.typing import NDArray

SIZE = 320
STILL = AugmentConfig(scale=0, translate=0, fliplr=0, mosaic=0, hsv_h=0, hsv_s=0, hsv_v=0)
seeds = st.integers(0, 10**6)
turns = st.builds(
    AugmentConfig,
    degrees=st.sampled_from([0.0, 20.0, 180.0]),
    shear=st.sampled_from([0.0, 20.0]),
    perspective=st.sampled_from([0.0, 0.0005, 0.001]),
    scale=st.sampled_from([0.0, 0.9]),
    mosaic=st.sampled_from([0.0, 1.0]),
)


def plan(config: AugmentConfig, seed: int, *, size: int = SIZE, count: int = 4) -> augment.Transforms:
    sizes = np.random.default_rng(seed).integers(20, 900, (6, 2))
    samples = np.arange(count) % 6
    draws = augment.draw(seed, np.arange(count), samples)
    partners = augment.partners_of_all(augment.partner_draws(config, draws), 6)
    images = np.concatenate([samples[:, None], partners], axis=1)
    return augment.plan(config, size, draws, images, sizes[images], np.ones_like(images), mosaic=True)


@pytest.mark.parametrize("config", [STILL, dataclasses.replace(STILL, degrees=1e-9, perspective=1e-12)])
def test_nothing_asked_for_is_the_identity(config: AugmentConfig) -> None:
    draws = augment.draw(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
    zeros, ones = np.zeros((1, 4), np.int64), np.ones((1, 4), np.int64)
    transforms = augment.plan(config, SIZE, draws, zeros, np.full((1, 4, 2), SIZE), ones, mosaic=True)
    np.testing.assert_allclose(transforms.matrices[0, 0], np.eye(3), atol=1e-6)
    boxes = np.array([[0.0, 0, 320, 320], [17, 30, 200, 100]])
    placed, kept = place_boxes(transforms, np.zeros(2, np.int64), np.zeros(2, np.int64), boxes)
    np.testing.assert_allclose(placed, boxes, atol=1e-4)
    assert kept.all()


@settings(max_examples=50, deadline=None)
@given(config=turns, seed=seeds)
def test_mirrored_twice_is_as_before(config: AugmentConfig, seed: int) -> None:
    transforms = plan(config, seed)
    flips = np.random.default_rng(seed).random((4, 2)) < 0.5
    matrices, places = transforms.matrices.copy(), transforms.places.copy()
    mirror(SIZE, flips, matrices, places)
    mirror(SIZE, flips, matrices, places)
    np.testing.assert_allclose(matrices, transforms.matrices, atol=1e-9)
    np.testing.assert_array_equal(places, transforms.places)


@settings(max_examples=50, deadline=None)
@given(config=turns, seed=seeds)
def test_maps_compose_and_invert(config: AugmentConfig, seed: int) -> None:
    transforms = plan(config, seed)
    assume((transforms.sources[:2, 0] >= 0).all())  # of what is not seen the map may be flat
    matrices = transforms.matrices[:2, 0]
    points = np.random.default_rng(seed).random((20, 2)) * 15
    there = map_points(matrices[0], points)
    np.testing.assert_allclose(map_points(np.linalg.inv(matrices[0]), there), points, atol=1e-6)
    shrunk = np.diag([0.01, 0.01, 1.0])  # keeps the second map's horizon away from what the first one gives
    np.testing.assert_allclose(
        map_points(matrices[1], map_points(shrunk @ matrices[0], points)),
        map_points(matrices[1] @ shrunk @ matrices[0], points),
        rtol=1e-6,
        atol=1e-6,
    )


@settings(max_examples=80, deadline=None)
@given(config=turns, seed=seeds, size=st.sampled_from([64, 640, 1280]))
def test_the_horizon_stays_away(config: AugmentConfig, seed: int, size: int) -> None:
    """Of what is seen of a tile, everything has a depth of a quarter or more, so bounds of corners are bounds."""
    transforms = plan(config, seed, size=size)
    rows, tiles = np.nonzero(transforms.sources >= 0)
    matrices, visible = transforms.matrices[rows, tiles], transforms.visible[rows, tiles]
    inside = np.random.default_rng(seed).random((len(rows), 30, 2))
    points = visible[:, None, :2] + inside * (visible[:, None, 2:] - visible[:, None, :2])
    bounds = map_boxes(matrices, visible)
    for matrix, own, bound in zip(matrices, points, bounds, strict=True):
        depth = own @ matrix[2, :2] + matrix[2, 2]
        assert depth.min() >= 0.25 - 1e-9
        mapped = map_points(matrix, own)
        assert (mapped >= bound[:2] - 1e-6).all()
        assert (mapped <= bound[2:] + 1e-6).all()


@settings(max_examples=30, deadline=None)
@given(config=turns, seed=seeds)
def test_placed_boxes_are_within_what_is_seen(config: AugmentConfig, seed: int) -> None:
    transforms = plan(config, seed)
    rows, tiles = np.nonzero(transforms.sources >= 0)
    corners = np.sort(np.random.default_rng(seed).random((len(rows), 2, 2)) * 900, axis=1).reshape(-1, 4)
    placed, kept = place_boxes(transforms, rows, tiles, corners)
    seen = map_boxes(transforms.matrices[rows, tiles], transforms.visible[rows, tiles])
    assert (placed[kept, :2] >= np.maximum(seen[kept, :2], 0) - 1e-6).all()
    assert (placed[kept, 2:] <= np.minimum(seen[kept, 2:], SIZE) + 1e-6).all()


@settings(max_examples=100, deadline=None)
@given(config=turns, seed=seeds)
def test_bounds_within_a_rectangle_are_those_of_the_points_there(config: AugmentConfig, seed: int) -> None:
    """Against many points of each box: those that come to lie in the rectangle."""
    transforms = plan(config, seed)
    matrices = transforms.matrices.reshape(-1, 3, 3)
    rng = np.random.default_rng(seed)
    shares = np.sort(rng.random((len(matrices), 2, 2)), axis=1).reshape(-1, 4)
    visible = transforms.visible.reshape(-1, 4)
    boxes = visible[:, [0, 1, 0, 1]] + shares * (visible[:, 2:] - visible[:, :2])[:, [0, 1, 0, 1]]
    rectangles = np.sort(rng.random((len(matrices), 2, 2)) * SIZE, axis=1).reshape(-1, 4)
    found = map_boxes_within(matrices, boxes, rectangles)
    grid = np.stack(np.meshgrid(np.linspace(0, 1, 121), np.linspace(0, 1, 121)), axis=-1).reshape(-1, 2)
    for matrix, box, rectangle, bounds in zip(matrices, boxes, rectangles, found, strict=True):
        points = map_points(matrix, box[:2] + grid * (box[2:] - box[:2]))
        step = np.abs(np.diff(points.reshape(121, 121, 2), axis=0)).max(initial=0)
        step += np.abs(np.diff(points.reshape(121, 121, 2), axis=1)).max(initial=0)
        there = points[((points >= rectangle[:2]) & (points <= rectangle[2:])).all(axis=1)]
        if len(there):
            assert (bounds[:2] <= there.min(axis=0) + 1e-6).all()
            assert (bounds[2:] >= there.max(axis=0) - 1e-6).all()
        assert (bounds[:2] >= rectangle[:2] - 1e-6).all()
        assert (bounds[2:] <= rectangle[2:] + 1e-6).all()
        near = points[((points >= rectangle[:2] - step) & (points <= rectangle[2:] + step)).all(axis=1)]
        if (bounds[2:] > bounds[:2]).any():
            assert (bounds[:2] >= near.min(axis=0) - step).all()
            assert (bounds[2:] <= near.max(axis=0) + step).all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds, order=st.permutations(range(4)))
def test_tiles_of_a_mosaic_may_be_painted_in_any_order(seed: int, order: list[int]) -> None:
    """They do not overlap, so pixels and boxes are the same."""
    transforms = plan(AugmentConfig(flipud=0.5), seed, count=1)
    per_tile = ("sources", "matrices", "visible", "places", "reductions", "halvings", "layers", "clips", "masked")
    permuted = dataclasses.replace(transforms, **{name: getattr(transforms, name)[:, order] for name in per_tile})
    sizes = np.random.default_rng(seed).integers(20, 900, (6, 2))
    drawn = []
    for one in (transforms, permuted):
        sources = one.sources[0].tolist()
        images = [picture(number, *sizes[number].tolist()) if number >= 0 else None for number in sources]
        out = np.zeros((SIZE, SIZE, 3), np.uint8)
        render(one, range(1), [images], Workspace(SIZE), out[None], plain=plain_of(one))
        drawn.append(out)
    np.testing.assert_array_equal(*drawn)
    boxes = np.tile([5.0, 5, 300, 300], (4, 1))
    zeros = np.zeros(4, np.int64)
    placed, kept = place_boxes(transforms, zeros, np.array(order), boxes)
    moved, kept_too = place_boxes(permuted, zeros, np.arange(4), boxes)
    np.testing.assert_array_equal(placed, moved)
    np.testing.assert_array_equal(kept, kept_too)


def picture(number: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)


def test_few_tiles_are_the_first_of_many() -> None:
    """A single image is laid out as it is where there is room for a mosaic."""
    config = dataclasses.replace(AugmentConfig(), mosaic=0.0)
    draws = augment.draw(0, np.arange(3), np.arange(3))
    sizes, ones = np.full((3, 4, 2), (100, 200)), np.ones((3, 4), np.int64)
    alone = lay_tiles(config, SIZE, draws, sizes[:, :1], ones[:, :1], np.zeros(3, bool))
    many = lay_tiles(config, SIZE, draws, sizes, ones, np.zeros(3, bool))
    for field in dataclasses.fields(alone):
        np.testing.assert_array_equal(getattr(alone, field.name), getattr(many, field.name)[:, :1])
