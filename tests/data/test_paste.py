"""Which objects are pasted, where their pixels are opaque, and what becomes of boxes below them."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data import augment, paste, targets
from paceline.data.config import AugmentConfig
from paceline.data.draws import hashed
from paceline.data.formats.coco_file import FARTHEST_PX
from paceline.data.index import Index, Strings
from paceline.data.polygons import Polygons

SIZE = 128


def square(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def index_of(boxes: list[list[tuple[float, float, float, float]]], outlined: list[list[bool]]) -> Index:
    """Images of 128 x 128 px with these boxes, each of which may be its own outline."""
    flat = np.array([box for own in boxes for box in own], float).reshape(-1, 4)
    flags = [flag for own in outlined for flag in own]
    number = len(boxes)
    return Index(
        names=("thing", "other"),
        root=Path("/nowhere"),
        paths=Strings.of([""] * number),
        sizes=np.full((number, 2), SIZE, np.int32),
        orientation=np.ones(number, np.uint8),
        offsets=np.cumsum([0, *map(len, boxes)]),
        boxes=flat,
        labels=(np.arange(len(flat)) % 2).astype(np.int32),
        crowd=np.zeros(len(flat), bool),
        difficult=np.zeros(len(flat), bool),
        area=np.ones(len(flat)),
        image_ids=np.arange(number),
        category_ids=np.arange(2),
        origins=np.arange(number),
        polygons=Polygons.of([square(*box)] if flag else [] for box, flag in zip(flat, flags, strict=True)),
    )


@pytest.mark.filterwarnings("error")
def test_outline_that_reaches_as_far_as_any_may_is_drawn_where_the_image_is() -> None:
    far = float(FARTHEST_PX)
    rings = [[[0, 0], [far, 0], [far, 64], [0, 64]], [[-far, 100], [20, 100], [20, far], [-far, far]]]
    index = dataclasses.replace(index_of([[(0, 0, 128, 128)]], [[True]]), polygons=Polygons.of([rings]))
    mask = paste.mask_of(index, np.array([0]), 0, 1)
    expected = np.zeros((SIZE, SIZE), bool)
    expected[:64], expected[100:, :20] = True, True
    assert np.array_equal(mask > 127, expected)


def test_half_of_the_outlined_targets_are_chosen_and_at_least_one() -> None:
    boxes = [(10.0, 10, 20, 20), (30, 30, 40, 40), (50, 50, 60, 60), (70, 70, 80, 80)]
    index = index_of([boxes, boxes[:1], boxes], [[True, True, False, True], [True], [False] * 4])
    index.crowd[3] = True
    picks = hashed(np.arange(2000))
    chosen = [paste.chosen(index, 0, pick).tolist() for pick in picks]
    assert {row for rows in chosen for row in rows} == {0, 1}
    assert min(map(len, chosen)) == 1
    assert abs(np.mean([0 in rows for rows in chosen]) - 0.625) < 0.03  # 1/2, and half of the quarter where none is
    assert all(paste.chosen(index, 1, pick).tolist() == [4] for pick in picks[:9])
    assert not len(paste.chosen(index, 2, picks[0]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=4, max_size=4), st.sampled_from([1, 2, 4]))
def test_mask_is_the_share_of_each_pixel(corners: list[int], reduction: int) -> None:
    """Against counting source pixels, for rectangles that end on them."""
    left, right = sorted(corners[:2])
    top, bottom = sorted(corners[2:])
    index = index_of([[(left, top, right + 1.0, bottom + 1.0)]], [[True]])
    mask = paste.mask_of(index, np.zeros(1, np.int64), 0, reduction)
    drawn = np.zeros((SIZE, SIZE))
    drawn[top : bottom + 1, left : right + 1] = 255
    expected = drawn.reshape(SIZE // reduction, reduction, -1, reduction).mean(axis=(1, 3))
    assert np.abs(mask - expected).max() <= 255 * 0.25
    assert abs(mask.sum() / 255 * reduction**2 - (drawn > 0).sum()) <= 0.3 * reduction * (
        right - left + bottom - top + 2
    )


def test_rings_of_an_object_are_joined_and_those_outside_are_cut() -> None:
    index = dataclasses.replace(
        index_of([[(0.0, 0, 60, 60)]], [[True]]),
        polygons=Polygons.of([[square(0, 0, 40, 40), square(20, 20, 60, 60), square(-50, 100, 300, 120)]]),
    )
    mask = paste.mask_of(index, np.zeros(1, np.int64), 0, 1)
    assert mask.shape == (SIZE, SIZE)
    assert (mask[30, [1, 30, 58]] == 255).tolist() == [True, True, True]
    assert mask[10, 50] == 0
    assert (mask[110] == 255).all()


def paste_config(**more: float) -> AugmentConfig:
    return AugmentConfig(copy_paste=1.0, mosaic=0.0, scale=0.0, translate=0.0, fliplr=0.0, **more)  # type: ignore[arg-type]


def transforms_of(config: AugmentConfig, images: list[int]) -> augment.Transforms:
    """One picture of the first image, pasted from the last."""
    draws = augment.draw(0, np.zeros(1, np.int64), np.zeros(1, np.int64))
    numbers = np.array([images])
    sizes, ones = np.full((1, len(images), 2), SIZE), np.ones((1, len(images)), np.int64)
    return augment.plan(config, SIZE, draws, numbers, sizes, ones, mosaic=True)


def test_boxes_that_are_covered_too_far_go() -> None:
    below = [(30.0, 0, 60, 40), (100, 100, 120, 120), (40, 0, 60, 40), (8, 8, 100, 100)]
    index = index_of([below, [(0.0, 0, 48, 48)]], [[False] * 4, [True]])
    pictures, boxes, labels = targets.transformed(index, transforms_of(paste_config(), [0, 0, 0, 0, 1]))
    assert pictures.tolist() == [0] * 4
    assert boxes.tolist() == [[100, 100, 120, 120], [40, 0, 60, 40], [8, 8, 100, 100], [0, 0, 48, 48]]
    assert labels.tolist() == [1, 0, 1, 0]


def test_an_image_without_outlines_gives_nothing() -> None:
    index = index_of([[(0.0, 0, 40, 40)], [(0.0, 0, 48, 48)]], [[True], [False]])
    transforms = transforms_of(paste_config(), [0, 0, 0, 0, 1])
    assert paste.masks(index, transforms, 0) == {}
    assert targets.transformed(index, transforms)[1].tolist() == [[0, 0, 40, 40]]


def test_covered_share_is_that_of_the_union() -> None:
    rings = [np.array(square(0, 0, 64, 64), float), np.array(square(32, 32, 96, 96), float)]
    boxes = np.array([[0, 0, 32, 32], [0, 0, 128, 128], [100, 100, 128, 128], [32, 32, 128, 64.0]])
    shares = paste.covered(SIZE, rings, boxes)
    np.testing.assert_allclose(shares, [1, (2 * 64**2 - 32**2) / 128**2, 0, 64 / 96], atol=0.07)


def test_a_set_without_outlines_says_once_that_nothing_is_pasted(caplog: pytest.LogCaptureFixture) -> None:
    index = index_of([[(0.0, 0, 40, 40)]], [[False]])
    with caplog.at_level(logging.WARNING, "paceline"):
        assert paste.usable(paste_config(), index) == dataclasses.replace(paste_config(), copy_paste=0.0)
    assert len(caplog.records) == 1
    with_outlines = index_of([[(0.0, 0, 40, 40)]], [[True]])
    assert paste.usable(paste_config(), with_outlines) == paste_config()
    assert len(caplog.records) == 1
