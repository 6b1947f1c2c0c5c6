"""Pictures in one call: the bytes of resampling, then changing colours; at every level, at any size and place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.native.jitter import jitter_by_kernel
from paceline.native.library import PIXELS
from paceline.native.picture import COLUMNS, draw_pictures, kernels_for_pictures
from paceline.native.resample import resample_by_kernel

if TYPE_CHECKING:
    import ctypes

Pixels = NDArray[np.uint8]
FILL = 114


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
    hsv: tuple[float, float, float],
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
        drawn = np.ascontiguousarray(part)
        if place.shape[:2] != part.shape[:2]:
            drawn = np.empty((*place.shape[:2], *part.shape[2:]), np.uint8)
            if drawn.size:
                resample_by_kernel(kernels, part, drawn, 0)
        place[...] = drawn if drawn.ndim == place.ndim else drawn[..., None]
    out = np.empty((size, size, 3), np.uint8)
    jitter_by_kernel(kernels, picture, hsv, out, mirror_x=mirror_x, mirror_y=mirror_y, level=0)
    return out


@dataclass(frozen=True)
class Pictures:
    """Some pictures of one size, of as many tiles each."""

    size: int
    tiles: NDArray[np.int64]
    images: list[list[Pixels | None]]
    hsv: NDArray[np.float64]
    mirrors: NDArray[np.bool_]


@st.composite
def pictures(draw: st.DrawFn) -> Pictures:
    """Draw tiles anywhere, over each other too, some at their own size, some of no area, some without an image."""
    size, count, num_tiles = draw(st.integers(1, 120)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    tiles: list[tuple[int, ...]] = []
    images: list[Pixels | None] = []
    for _ in range(count * num_tiles):
        unit = draw(st.integers(1, 2))
        width, height = (draw(st.integers(2, 90)) for _ in range(2))
        wide, high = draw(st.integers(0, size)), draw(st.integers(0, size))
        if size >= 2 and draw(st.booleans()):
            width, height = wide, high = max(min(width, size), 2), max(min(height, size), 2)
        x, y, left, top = (draw(st.integers(0, most)) for most in (9, 9, size - wide, size - high))
        tiles.append((x, y, unit * height, unit * width, unit - 1, left, top, left + wide, top + high))
        shape = (y + unit * height + 3, x + unit * width + 5)
        images.append(random.integers(0, 256, (*shape, 3) if draw(st.booleans()) else shape, np.uint8))
        if draw(st.integers(0, 5)) == 0:
            images[-1] = None
    return Pictures(
        size=size,
        tiles=np.array(tiles, np.int64).reshape(count, num_tiles, COLUMNS),
        images=[images[start : start + num_tiles] for start in range(0, len(images), num_tiles)],
        hsv=np.array([(0.3 * row, 1.4 - row / 3, 0.7 + row / 5) for row in range(count)]),
        mirrors=random.integers(0, 2, (count, 2)).astype(np.bool_),
    )


@settings(max_examples=200, deadline=None)
@given(drawn=pictures(), chosen=st.lists(st.booleans(), min_size=3, max_size=3))
def test_it_is_resampling_and_then_jitter_at_every_level(
    kernels: ctypes.CDLL, drawn: Pictures, chosen: list[bool]
) -> None:
    count, size = len(drawn.tiles), drawn.size
    expected = np.full((count, size, size, 3), 77, np.uint8)
    for row in np.flatnonzero(chosen[:count]):
        mirror_x, mirror_y = drawn.mirrors[row].tolist()
        expected[row] = one_after_the_other(
            *(kernels, drawn.tiles[row], drawn.images[row], size, tuple(drawn.hsv[row].tolist())),
            mirror_x=mirror_x,
            mirror_y=mirror_y,
        )
    for level in range(kernels.paceline_level() + 1):
        around = np.full((count + 2, size, size, 3), 77, np.uint8)
        said = draw_pictures(
            *(kernels, drawn.tiles, drawn.images, drawn.hsv, drawn.mirrors, around[1:-1], chosen[:count]),
            fill=FILL,
            level=level,
        )
        assert said == chosen[:count]
        assert np.array_equal(around[1:-1], expected)
        assert (around[[0, -1]] == 77).all(), "and nothing else is written"


def test_pictures_of_images_that_it_cannot_take_are_left_to_others(kernels: ctypes.CDLL) -> None:
    colour, grey = np.zeros((20, 20, 3), np.uint8), np.zeros((20, 20), np.uint8)
    takes: list[Pixels | None] = [
        None,
        colour,
        grey,
        colour[::-1],
        colour[3:, 4:],
        grey[3:, 4:],
        np.asfortranarray(grey).T,
    ]
    cannot: list[Pixels | None] = [colour[:, ::-1], colour[..., ::-1], grey[:, ::2], np.asfortranarray(colour), grey.T]
    images = [[None, image] for image in (*takes, *cannot)]
    count = len(images)
    tiles = np.tile(np.array([0, 0, 9, 9, 0, 0, 0, 8, 8]), (count, 2, 1))
    hsv, mirrors = np.tile([0.0, 1.0, 1.0], (count, 1)), np.zeros((count, 2), np.bool_)
    out = np.full((count, 8, 8, 3), 77, np.uint8)
    drawn = draw_pictures(kernels, tiles, images, hsv, mirrors, out, [True] * count, fill=FILL)
    assert drawn == [True] * len(takes) + [False] * len(cannot)
    assert out.max(axis=(1, 2, 3)).tolist() == [FILL] + [0] * (len(takes) - 1) + [77] * len(cannot)


@pytest.mark.parametrize(
    "tile",
    [
        (-1, 0, 9, 9, 0, 0, 0, 8, 8),
        (0, -1, 9, 9, 0, 0, 0, 8, 8),
        (12, 0, 9, 9, 0, 0, 0, 8, 8),
        (0, 12, 9, 9, 0, 0, 0, 8, 8),
        (0, 0, 2**40, 9, 0, 0, 0, 8, 8),
        (0, 0, 9, 1, 0, 0, 0, 8, 8),
        (0, 0, 2, 9, 1, 0, 0, 8, 8),
        (0, 0, 9, 8, 1, 0, 0, 8, 8),
        (0, 0, 9, 9, 0, -1, 0, 8, 8),
        (0, 0, 9, 9, 0, 0, 0, 9, 8),
        (0, 0, 9, 9, 0, 0, 3, 8, 2),
        (0, 0, 9, 9, 0, 0, 0, 8, 9),
    ],
)
def test_a_tile_that_is_not_in_its_image_or_the_picture_is_noticed(kernels: ctypes.CDLL, tile: tuple[int, ...]) -> None:
    """Else it would be read from, or written to, whatever lies beside it."""
    image, out = np.zeros((60, 60, 3), np.uint8)[20:40, 20:40], np.full((3, 8, 8, 3), 77, np.uint8)
    tiles, hsv, mirrors = np.array([[tile]]), np.array([[0.0, 1.0, 1.0]]), np.zeros((1, 2), np.bool_)
    with pytest.raises(AssertionError, match="does not lie"):
        draw_pictures(kernels, tiles, [[image]], hsv, mirrors, out[1:2], [True], fill=FILL)
    assert (out == 77).all()


def test_it_is_used_where_it_is_fast(kernels: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "paceline_level", lambda: 2)
    assert kernels_for_pictures() is kernels
    monkeypatch.setattr(kernels, "paceline_level", lambda: 1)
    assert kernels_for_pictures() is None, "OpenCV is faster there"
    monkeypatch.setattr("paceline.native.picture.library", lambda: None)
    assert kernels_for_pictures() is None
