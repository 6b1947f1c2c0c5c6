"""Pictures in one call: the bytes of resampling, then changing colours; at every level, at any size and place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.native.jitter import jitter_by_kernel
from paceline.native.library import PIXELS
from paceline.native.picture import COLUMNS, draw_picture, kernels_for
from paceline.native.resample import resample_by_kernel

if TYPE_CHECKING:
    import ctypes

Pixels = NDArray[np.uint8]
FILL = 114
HSV = (0.1, 1.4, 0.7)


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    found = PIXELS.get()
    if found is None:
        pytest.skip("they were not built")
    return found


def one_after_the_other(
    kernels: ctypes.CDLL,
    tiles: NDArray[np.int64],
    images: list[Pixels | None],
    size: int,
    *,
    mirror_x: bool,
    mirror_y: bool,
) -> Pixels:
    colour = any(image is not None and image.ndim == 3 for image in images)
    picture = np.full((size, size, 3) if colour else (size, size), FILL, np.uint8)
    for (x, y, height, width, is_halved, left, top, right, bottom), image in zip(tiles.tolist(), images, strict=True):
        if image is None:
            continue
        part, place = image[y : y + height, x : x + width], picture[top:bottom, left:right]
        if is_halved:
            part = cv2.resize(part, (width // 2, height // 2), interpolation=cv2.INTER_AREA)
        if place.shape == part.shape:
            place[...] = part
        elif place.size:
            resample_by_kernel(kernels, part, place, 0)
    out = np.empty((size, size, 3), np.uint8)
    jitter_by_kernel(kernels, picture, HSV, out, mirror_x=mirror_x, mirror_y=mirror_y, level=0)
    return out


@st.composite
def pictures(draw: st.DrawFn) -> tuple[NDArray[np.int64], list[Pixels | None], int]:
    """Draw tiles anywhere, over each other too, some at their own size, some of no area, some without an image."""
    size, colour = draw(st.integers(1, 120)), draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tiles: list[tuple[int, ...]] = []
    images: list[Pixels | None] = []
    for _ in range(draw(st.integers(0, 5))):
        unit = draw(st.integers(1, 2))
        width, height = (draw(st.integers(2, 90)) for _ in range(2))
        wide, high = draw(st.integers(0, size)), draw(st.integers(0, size))
        if size >= 2 and draw(st.booleans()):
            width, height = wide, high = min(width, size), min(height, size)
        x, y, left, top = (draw(st.integers(0, most)) for most in (9, 9, size - wide, size - high))
        tiles.append((x, y, unit * height, unit * width, unit - 1, left, top, left + wide, top + high))
        shape = (y + unit * height + 3, x + unit * width + 5)
        images.append(random.integers(0, 256, (*shape, 3) if colour else shape, np.uint8))
        if draw(st.integers(0, 5)) == 0:
            images[-1] = None
    return np.array(tiles, np.int64).reshape(-1, COLUMNS), images, size


@settings(max_examples=200, deadline=None)
@given(drawn=pictures(), mirror_x=st.booleans(), mirror_y=st.booleans())
def test_it_is_resampling_and_then_jitter_at_every_level(
    kernels: ctypes.CDLL,
    drawn: tuple[NDArray[np.int64], list[Pixels | None], int],
    mirror_x: bool,
    mirror_y: bool,
) -> None:
    tiles, images, size = drawn
    expected = one_after_the_other(kernels, tiles, images, size, mirror_x=mirror_x, mirror_y=mirror_y)
    for level in range(kernels.paceline_level() + 1):
        around = np.full((size + 2, size, 3), 77, np.uint8)
        draw_picture(
            *(kernels, tiles, images, HSV, around[1:-1]),
            fill=FILL,
            mirror_x=mirror_x,
            mirror_y=mirror_y,
            level=level,
        )
        assert np.array_equal(around[1:-1], expected)
        assert (around[[0, -1]] == 77).all(), "and nothing else is written"


def test_images_that_it_cannot_take_are_left_to_others(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    colour, grey = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.uint8)
    monkeypatch.setattr(kernels, "paceline_level", lambda: 2)
    for images in ([], [None], [colour, None, colour], [grey, grey], [colour[::-1], colour[3:, 4:]]):
        assert kernels_for(images) is kernels
    for images in ([colour, grey], [colour[:, ::-1]], [colour[..., ::-1]], [grey[:, ::2]]):
        assert kernels_for(images) is None
    monkeypatch.setattr(kernels, "paceline_level", lambda: 1)
    assert kernels_for([colour]) is None, "OpenCV is faster there"
    monkeypatch.setattr("paceline.native.picture.library", lambda: None)
    assert kernels_for([colour]) is None
