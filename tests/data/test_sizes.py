"""Shapes of batches: few, fitting, and in evaluation without any effect on where boxes come to lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.sizes import MOST_SHAPES, MOST_SIZES, rect_shapes, size_of_step, sizes_of
from paceline.letterbox import Letterbox


@given(st.integers(1, 60), st.floats(0, 0.99))
def test_sizes_are_few_multiples_within_the_share(number: int, share: float) -> None:
    imgsz = 32 * number
    sizes = sizes_of(imgsz, share)
    assert 1 <= len(sizes) <= MOST_SIZES
    assert imgsz in sizes
    assert list(sizes) == sorted(set(sizes))
    assert all(size % 32 == 0 and size > 0 for size in sizes)
    assert all(imgsz * (1 - share) - 1e-6 <= size <= imgsz * (1 + share) + 1e-6 for size in sizes)


@pytest.mark.parametrize(
    ("share", "expected"), [(0.0, (640,)), (0.04, (640,)), (0.05, (608, 640, 672)), (0.5, (320, 480, 640, 800, 960))]
)
def test_sizes_of_640(share: float, expected: tuple[int, ...]) -> None:
    assert sizes_of(640, share) == expected


def test_steps_take_each_size_as_often_and_by_seed_and_number_alone() -> None:
    sizes = sizes_of(640, 0.5)
    drawn = [size_of_step(sizes, 1, step) for step in range(2000)]
    assert all(abs(drawn.count(size) / 2000 - 0.2) < 0.04 for size in sizes)
    assert drawn != [size_of_step(sizes, 2, step) for step in range(2000)]
    assert size_of_step(sizes, 1, 7) == drawn[7]
    assert {size_of_step((320,), 1, step) for step in range(9)} == {320}


image_sizes = st.lists(st.tuples(st.integers(1, 3000), st.integers(1, 3000)), min_size=1, max_size=60)


@settings(max_examples=150, deadline=None)
@given(sizes=image_sizes, imgsz=st.sampled_from([32, 96, 640]), batch=st.integers(1, 9))
def test_rectangles_hold_their_images_as_the_square_does(sizes: list[tuple[int, int]], imgsz: int, batch: int) -> None:
    """Every image is scaled to the same pixels as in a square, so a network sees the same but for the grey."""
    sizes_N2 = np.array(sizes)
    order, shapes = rect_shapes(sizes_N2, imgsz, batch)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    assert len(shapes) == -(-len(sizes) // batch)
    assert (shapes % 32 == 0).all()
    assert (shapes >= 32).all()
    assert (shapes <= imgsz).all()
    assert len(np.unique(shapes, axis=0)) <= MOST_SHAPES
    aspects = sizes_N2[order, 0] / sizes_N2[order, 1]
    assert (np.diff(aspects) >= 0).all()
    for place, number in enumerate(order.tolist()):
        height, width = sizes[number]
        rect = Letterbox.fit(height, width, *shapes[place // batch].tolist())
        square = Letterbox.fit(height, width, imgsz, imgsz)
        assert (rect.scaled_height, rect.scaled_width) == (square.scaled_height, square.scaled_width)


@settings(max_examples=150, deadline=None)
@given(sizes=image_sizes, seed=st.integers(0, 99))
def test_boxes_come_back_from_any_rectangle(sizes: list[tuple[int, int]], seed: int) -> None:
    order, shapes = rect_shapes(np.array(sizes), 640, 4)
    for place, number in enumerate(order.tolist()):
        height, width = sizes[number]
        corners = np.sort(np.random.default_rng(seed).random((5, 2, 2)) * (width, height), axis=1).reshape(5, 4)
        rect = Letterbox.fit(height, width, *shapes[place // 4].tolist())
        placed = rect.forward(corners)
        assert (placed >= -1e-9).all()
        assert (placed <= shapes[place // 4][[1, 0, 1, 0]] + 1e-9).all()
        np.testing.assert_allclose(rect.inverse(placed), corners, atol=1e-9 * max(height, width))


def test_rectangles_save_what_they_can() -> None:
    """Of one shape all batches are that shape, and a mixture costs less grey than squares."""
    _, shapes = rect_shapes(np.array([[480, 640]] * 40), 640, 16)
    assert shapes.tolist() == [[480, 640]] * 3
    mixture = np.random.default_rng(0).integers(300, 640, (500, 2))
    _, shapes = rect_shapes(mixture, 640, 16)
    assert shapes.prod(axis=1).mean() < 0.9 * 640**2
