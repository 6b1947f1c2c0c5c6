from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from paceline.native.jitter import jitter, jitter_by_kernel, jitter_by_opencv
from paceline.native.library import best_level, library

if TYPE_CHECKING:
    import ctypes

Pixels = NDArray[np.uint8]
JITTERS = [
    (0.0, 1.0, 1.0),
    (0.015, 1.7, 0.6),
    (-0.015, 0.3, 1.4),
    (0.5, 1.0, 1.0),
    (-0.37, 0.0, 1.0),
    (0.999, 9.0, 9.0),
]


@pytest.fixture
def kernels() -> ctypes.CDLL:
    found = library()
    if found is None:
        pytest.skip("the kernels were not built")
    return found


def random_picture(height: int, width: int, channels: int = 3, seed: int = 0) -> Pixels:
    shape = (height, width, 3) if channels == 3 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def edge_colours() -> Pixels:
    """Greys, black, white, full colours, and all that lies a step beside equal channels: 35 x 35 x 35 as a picture."""
    steps = np.unique(np.concatenate([[0, 1, 2, 127, 128, 129, 253, 254, 255], np.arange(0, 256, 10)]))
    colours = np.array(list(itertools.product(steps, repeat=3)), np.uint8)
    return colours.reshape(len(steps), -1, 3)


def exact(picture: Pixels, hsv: tuple[float, float, float]) -> NDArray[np.float64]:
    """By the definitions of hue, saturation and value, in float64, not rounded."""
    shift, saturation_gain, value_gain = hsv
    rgb = picture.astype(np.float64)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value, least = rgb.max(-1), rgb.min(-1)
    chroma = value - least
    some = np.where(chroma > 0, chroma, 1)
    hue = np.select(
        [chroma == 0, value == red, value == green],
        [0 * value, (green - blue) / some, 2 + (blue - red) / some],
        4 + (red - green) / some,
    )
    hue = (hue / 6 + shift) % 1 * 6
    saturation = np.minimum(chroma / np.where(value > 0, value, 1) * saturation_gain, 1)
    value = np.minimum(value * value_gain, 255)
    channels = []
    for own in (5, 3, 1):
        place = (own + hue) % 6
        channels.append(value - value * saturation * np.clip(np.minimum(place, 4 - place), 0, 1))
    return np.stack(channels, -1)


@pytest.mark.parametrize("hsv", JITTERS)
@pytest.mark.parametrize("picture", [random_picture(97, 83), edge_colours()], ids=["random", "edges"])
def test_kernel_is_the_formula(kernels: ctypes.CDLL, picture: Pixels, hsv: tuple[float, float, float]) -> None:
    out = np.empty_like(picture)
    jitter_by_kernel(kernels, picture, hsv, out)
    assert np.abs(out - exact(picture, hsv)).max() < 0.55  # 0.5 is rounding


@pytest.mark.parametrize("hsv", JITTERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_all_levels_give_the_same_bytes(kernels: ctypes.CDLL, channels: int, hsv: tuple[float, float, float]) -> None:
    picture = random_picture(61, 131, channels)
    drawn = []
    for level in range(best_level(kernels) + 1):
        out = np.empty((61, 131, 3), np.uint8)
        jitter_by_kernel(kernels, picture, hsv, out, level=level)
        drawn.append(out)
    for other in drawn[1:]:
        np.testing.assert_array_equal(other, drawn[0])


@pytest.mark.parametrize("hsv", JITTERS)
@pytest.mark.parametrize("picture", [random_picture(97, 83), edge_colours()], ids=["random", "edges"])
def test_opencv_takes_its_place(picture: Pixels, hsv: tuple[float, float, float]) -> None:
    out = np.empty_like(picture)
    jitter_by_opencv(picture, hsv, out)
    difference = np.abs(out - exact(picture, hsv))
    if hsv[1] <= 2:  # a gain of 9 multiplies the steps of saturation
        assert difference.mean() < 2
        assert difference.max() < 10


def by_kernel(picture: Pixels, hsv: tuple[float, float, float], out: Pixels, **mirror: bool) -> None:
    kernels = library()
    if kernels is None:
        pytest.skip("the kernels were not built")
    jitter_by_kernel(kernels, picture, hsv, out, **mirror)


@pytest.mark.parametrize("way", [jitter, by_kernel, jitter_by_opencv])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 64), (5, 65), (4, 127), (3, 640), (3, 1100), (600, 1)])
def test_any_size_and_mirror_equals_the_plain_picture_mirrored(
    way: object, channels: int, shape: tuple[int, int]
) -> None:
    """And nothing beside the picture is written, whatever the distance from row to row."""
    assert callable(way)
    picture = random_picture(*shape, channels)
    plain = np.empty((*shape, 3), np.uint8)
    way(picture, (0.1, 1.2, 0.9), plain)
    for mirror_x, mirror_y in itertools.product((False, True), repeat=2):
        canvas = np.full((shape[0] + 2, shape[1] + 2, 3), 77, np.uint8)
        wider = np.concatenate([picture, picture[:, :1]], axis=1)[:, :-1]  # rows that are not close together
        way(wider, (0.1, 1.2, 0.9), canvas[1:-1, 1:-1], mirror_x=mirror_x, mirror_y=mirror_y)
        expected = plain[:: -1 if mirror_y else 1, :: -1 if mirror_x else 1]
        np.testing.assert_array_equal(canvas[1:-1, 1:-1], expected)
        canvas[1:-1, 1:-1] = 77
        assert (canvas == 77).all()


@pytest.mark.parametrize("way", [jitter, by_kernel, jitter_by_opencv])
@pytest.mark.parametrize("hsv", [(0.0, 1.0, 1.0), (1.0, 1.0, 1.0)])
def test_neutral_jitter_changes_nothing(way: object, hsv: tuple[float, float, float]) -> None:
    assert callable(way)
    for picture in (random_picture(40, 70), edge_colours()):
        out = np.empty_like(picture)
        way(picture, hsv, out)
        np.testing.assert_array_equal(out, picture)
    plane = random_picture(40, 70, channels=1)
    out = np.empty((40, 70, 3), np.uint8)
    way(plane, hsv, out)
    np.testing.assert_array_equal(out, np.repeat(plane[..., None], 3, axis=2))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mirror", [False, True])
def test_nothing_is_read_beside_the_picture(kernels: ctypes.CDLL, channels: int, mirror: bool) -> None:
    """A picture that ends with its mapping: a byte further there is nothing."""
    mmap = pytest.importorskip("mmap")
    for width in (1, 64, 65, 320, 384, 640):
        for level in range(best_level(kernels) + 1):
            with mmap.mmap(-1, mmap.PAGESIZE) as memory:
                whole = np.frombuffer(memory, np.uint8)
                picture = whole[len(whole) - 2 * width * channels :].reshape(random_picture(2, width, channels).shape)
                picture[...] = random_picture(2, width, channels)
                outs = [np.empty((2, width, 3), np.uint8) for _ in range(2)]
                for source, out in zip((picture, picture.copy()), outs, strict=True):
                    jitter_by_kernel(kernels, source, (0.1, 1.2, 0.9), out, mirror_x=mirror, level=level)
                np.testing.assert_array_equal(*outs)
                del source, picture, whole


@pytest.mark.parametrize("way", [jitter, by_kernel, jitter_by_opencv])
def test_one_plane_equals_three_that_are_equal(way: object) -> None:
    assert callable(way)
    plane = random_picture(33, 200, channels=1)
    gains = np.random.default_rng(1).uniform(0, 2, 20).tolist()
    for hsv in (*JITTERS, *((0.3, 1.5, gain) for gain in gains)):
        from_plane, from_colour = np.empty((33, 200, 3), np.uint8), np.empty((33, 200, 3), np.uint8)
        way(plane, hsv, from_plane)
        way(np.repeat(plane[..., None], 3, axis=2), hsv, from_colour)
        np.testing.assert_array_equal(from_plane, from_colour)


@pytest.mark.parametrize("way", [jitter, by_kernel, jitter_by_opencv])
def test_views_of_any_kind_are_read_right(way: object) -> None:
    assert callable(way)
    picture = random_picture(50, 60)
    for view in (picture.swapaxes(0, 1), picture[:, ::-1], picture[::-1], picture[::2, 1::2], picture[..., ::-1]):
        expected, out = np.empty((*view.shape,), np.uint8), np.empty((*view.shape,), np.uint8)
        way(np.ascontiguousarray(view), (0.2, 0.8, 1.1), expected)
        way(view, (0.2, 0.8, 1.1), out)
        np.testing.assert_array_equal(out, expected)


def test_out_may_not_be_the_picture() -> None:
    picture = random_picture(8, 8)
    with pytest.raises(AssertionError):
        jitter(picture, (0.0, 1.0, 1.0), picture)
