"""Resampling: linear interpolation against its definition in double, alike at every level, at any size and place."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.native.library import PIXELS
from paceline.native.resample import resample, resample_by_kernel, resample_by_opencv

Pixels = NDArray[np.uint8]
BOUND, BOUND_OF_OPENCV = 1.04, 0.9
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 300))


@pytest.fixture(scope="module")
def kernels() -> ctypes.CDLL:
    found = PIXELS.get()
    if found is None:
        pytest.skip("it was not built")
    return found


def pixels(height: int, width: int, channels: int, *, hard: bool = True, seed: int = 0) -> Pixels:
    """Draw random pixels; hard ones are black or white, where errors are largest."""
    shape = (height, width, 3) if channels == 3 else (height, width)
    random = np.random.default_rng(seed)
    return random.integers(0, 2, shape, np.uint8) * np.uint8(255) if hard else random.integers(0, 256, shape, np.uint8)


def places(count: int, wanted: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of each pixel of a result the first of its two, and the share of the other."""
    at = np.clip((np.arange(wanted) + 0.5) * (count / wanted) - 0.5, 0, count - 1)
    first = np.clip(at.astype(np.int64), 0, max(count - 2, 0))
    return first, at - first


def exact(source: Pixels, height: int, width: int) -> NDArray[np.float64]:
    """By the definition, in float64, not rounded."""
    values = source.reshape(*source.shape[:2], -1).astype(np.float64)
    for axis, wanted in ((0, height), (1, width)):
        first, share = places(values.shape[axis], wanted)
        share = share.reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        other = np.minimum(first + 1, values.shape[axis] - 1)
        values = values.take(first, axis) * (1 - share) + values.take(other, axis) * share
    return values.reshape(height, width, *source.shape[2:])


def drawn(kernels: ctypes.CDLL, source: Pixels, height: int, width: int, level: int) -> Pixels:
    out = np.full((height, width, *source.shape[2:]), 77, np.uint8)
    resample_by_kernel(kernels, source, out, level)
    return out


@settings(max_examples=150, deadline=None)
@given(
    sides=st.tuples(st.integers(2, 90), st.integers(2, 90), SIDES, SIDES),
    channels=st.sampled_from([1, 3]),
    hard=st.booleans(),
    seed=st.integers(0, 99),
)
def test_it_is_the_definition_at_every_level(
    kernels: ctypes.CDLL, sides: tuple[int, int, int, int], channels: int, hard: bool, seed: int
) -> None:
    height, width, *wanted = sides
    source = pixels(height, width, channels, hard=hard, seed=seed)
    found = [drawn(kernels, source, *wanted, level) for level in range(kernels.paceline_level() + 1)]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    assert np.abs(found[0] - exact(source, *wanted)).max() <= BOUND


@pytest.mark.parametrize("channels", [1, 3])
def test_levels_are_alike_at_any_ratio(kernels: ctypes.CDLL, channels: int) -> None:
    """However far apart in a row neighbours of the result are, and wherever in it the vectors end."""
    whole = pixels(2, 600, channels, hard=False)
    for count in (*range(2, 90, 4), *range(90, 601, 51)):
        for wanted in range(1, 131):
            source = whole[:, :count]
            right = drawn(kernels, source, 1, wanted, 0)
            for level in range(1, kernels.paceline_level() + 1):
                assert np.array_equal(drawn(kernels, source, 1, wanted, level), right), (count, wanted, level)


@settings(max_examples=60, deadline=None)
@given(sides=st.tuples(SIDES, SIDES, SIDES, SIDES), channels=st.sampled_from([1, 3]))
def test_opencv_takes_its_place_on_the_same_geometry(sides: tuple[int, int, int, int], channels: int) -> None:
    height, width, *wanted = sides
    source = pixels(height, width, channels)
    out = np.empty((*wanted, *source.shape[2:]), np.uint8)
    resample_by_opencv(source, out)
    right = exact(source, *wanted)
    assert np.abs(out - right).max() <= BOUND_OF_OPENCV
    resample(source, out)
    assert np.abs(out - right).max() <= BOUND


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("value", [0, 1, 127, 128, 254, 255])
def test_one_colour_stays_it(kernels: ctypes.CDLL, value: int, channels: int) -> None:
    source = np.full_like(pixels(31, 47, channels), value)
    for wanted in ((200, 300), (13, 7), (31, 48)):
        assert (drawn(kernels, source, *wanted, kernels.paceline_level()) == value).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mirrored_source_gives_the_mirrored_result(kernels: ctypes.CDLL, channels: int) -> None:
    """Up to rounding: a place in the middle of two pixels is rounded up on both sides."""
    source = pixels(40, 61, channels, hard=False)
    found = drawn(kernels, source, 70, 90, kernels.paceline_level())
    for axis in (0, 1):
        turned = drawn(kernels, np.ascontiguousarray(np.flip(source, axis)), 70, 90, kernels.paceline_level())
        assert np.abs(np.flip(turned, axis).astype(int) - found).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_views_are_read_and_written_where_they_lie(channels: int) -> None:
    source, picture = pixels(60, 90, channels), pixels(80, 100, channels)
    before, part, place = picture.copy(), (slice(7, 50), slice(11, 83)), (slice(9, 70), slice(13, 99))
    resample(source[part], picture[place])
    alone = np.empty_like(picture[place])
    resample(np.ascontiguousarray(source[part]), alone)
    assert np.array_equal(picture[place], alone)
    picture[place] = before[place]
    assert np.array_equal(picture, before), "and nothing else is written"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_end_of_memory_is_not_passed(kernels: ctypes.CDLL, channels: int) -> None:
    """A source that ends with a page: the next one may not be read."""
    with mmap.mmap(-1, 2 * mmap.PAGESIZE) as memory:
        whole = np.frombuffer(memory, np.uint8)
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        end = ctypes.c_void_p(whole.ctypes.data + mmap.PAGESIZE)
        if protect(end, ctypes.c_size_t(mmap.PAGESIZE), 0) != 0:
            pytest.skip("memory cannot be protected here")
        for width in (*range(2, 40), 64, 90, 150):
            size = 4 * width * channels
            source = whole[mmap.PAGESIZE - size : mmap.PAGESIZE].reshape((4, width, 3) if channels == 3 else (4, width))
            source[...] = pixels(4, width, channels)
            right = drawn(kernels, source.copy(), 9, 2 * width + 3, 0)
            for level in range(kernels.paceline_level() + 1):
                assert np.array_equal(drawn(kernels, source, 9, 2 * width + 3, level), right)
        del source, whole


@pytest.mark.parametrize(
    "change", ["one column", "one row", "channels apart", "nothing to draw", "missing", "no vector units"]
)
def test_what_the_compiled_code_does_not_take_is_done_without_it(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = pixels(9, 9, 3), np.empty((5, 12, 3), np.uint8)
    monkeypatch.setattr("paceline.native.resample.resample_by_kernel", lambda *_: pytest.fail("it took them"))
    if change == "one column":
        source = source[:, :1]
    elif change == "one row":
        source = source[:1]
    elif change == "channels apart":
        source = np.ascontiguousarray(source.transpose(2, 0, 1)).transpose(1, 2, 0)
    elif change == "nothing to draw":
        monkeypatch.setattr("paceline.native.resample.resample_by_opencv", lambda *_: pytest.fail("nor does it"))
        resample(source, out[:0])
        return
    elif change == "missing":
        monkeypatch.setattr(PIXELS, "get", lambda: None)
    elif PIXELS.get() is not None:
        monkeypatch.setattr(PIXELS.get(), "paceline_level", lambda: 0)
    resample(source, out)
    assert np.abs(out - exact(source, 5, 12)).max() <= BOUND_OF_OPENCV
