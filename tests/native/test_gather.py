from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from numpy.typing import NDArray

from paceline.native.gather import gather, gather_by_kernel, gather_by_numpy
from paceline.native.library import library

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Pixels = NDArray[np.uint8]


def by_kernel(parts: Sequence[Pixels], out: Pixels, starts: Sequence[int]) -> None:
    kernels = library()
    if kernels is None:
        pytest.skip("the kernels were not built")
    gather_by_kernel(kernels, parts, out, starts)


WAYS = pytest.mark.parametrize("way", [gather, by_kernel, gather_by_numpy])


@WAYS
def test_every_part_lies_at_its_start_and_nothing_else_is_written(
    way: Callable[[Sequence[Pixels], Pixels, Sequence[int]], None],
) -> None:
    rng = np.random.default_rng(0)
    parts: list[Pixels] = []
    for number in range(64):
        height, width = rng.integers(1, 90, 2)
        shape = (height, width, 3) if number % 3 else (height, width)
        image = rng.integers(0, 256, shape, dtype=np.uint8)
        top, left = rng.integers(0, height), rng.integers(0, width)
        parts.append(image[top:, left : left + 1 + rng.integers(0, width)])
    parts += [image[::-1], image.swapaxes(0, 1), image[::2, ::3], image[:0], image[:, :0]]
    gaps = rng.integers(0, 5, len(parts))
    starts = (np.cumsum([0, *(part.size for part in parts[:-1])]) + np.cumsum(gaps)).tolist()
    out = np.full(starts[-1] + parts[-1].size + 9, 7, np.uint8)
    way(parts, out, starts)
    for part, start in zip(parts, starts, strict=True):
        place = out[start : start + part.size]
        np.testing.assert_array_equal(place.reshape(part.shape), part)
        place[:] = 7
    assert (out == 7).all()


@WAYS
def test_no_parts(way: Callable[[Sequence[Pixels], Pixels, Sequence[int]], None]) -> None:
    out = np.full(3, 7, np.uint8)
    way([], out, [])
    assert (out == 7).all()


@pytest.mark.parametrize("start", [-1, 5])
def test_parts_have_to_fit(start: int) -> None:
    with pytest.raises(AssertionError, match="fit"):
        gather([np.zeros((2, 4), np.uint8)], np.zeros(12, np.uint8), [start])
