"""Rectangles lie row by row where they are told to, by compiled code and without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.device import rectangles
from paceline.data.device.rectangles import copy_by_numpy, copy_rectangles
from paceline.native.library import library

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Way = Callable[[NDArray[np.int64]], None]


def by_kernel(table: NDArray[np.int64]) -> None:
    if library() is None:
        pytest.skip("the kernels were not built")
    copy_rectangles(table)


WAYS = pytest.mark.parametrize("way", [by_kernel, copy_by_numpy])


@st.composite
def tables(draw: st.DrawFn) -> list[tuple[int, int, int, int, int]]:
    """Draw for some rectangles: the first byte in their image, its stride, bytes of a row, rows, bytes before them."""
    found = []
    for _ in range(draw(st.integers(0, 5))):
        row_bytes = draw(st.one_of(st.integers(0, 130), st.integers(4000, 4200), st.integers(8100, 8300)))
        stride = row_bytes + draw(st.integers(0, 70))
        rows = draw(st.integers(0, 12 if row_bytes > 130 else 90))
        found.append((draw(st.integers(0, 70)), stride, row_bytes, rows, draw(st.integers(0, 130))))
    return found


@WAYS
@settings(max_examples=150, deadline=None)
@given(drawn=tables(), shift=st.integers(0, 63))
def test_every_row_lies_at_its_place_and_nothing_else_is_written(
    way: Way, drawn: list[tuple[int, int, int, int, int]], shift: int
) -> None:
    random = np.random.default_rng(0)
    sources = [
        random.integers(0, 256, first + stride * rows + row_bytes, np.uint8)
        for first, stride, row_bytes, rows, _ in drawn
    ]
    memory = np.full(shift + sum(row_bytes * rows + gap for *_, row_bytes, rows, gap in drawn) + 64, 7, np.uint8)
    expected, place, table = memory.copy(), shift, []
    for source, (first, stride, row_bytes, rows, gap) in zip(sources, drawn, strict=True):
        place += gap
        table.append((source.ctypes.data + first, stride, row_bytes, rows, memory.ctypes.data + place))
        for row in range(rows):
            begin = first + row * stride
            expected[place : place + row_bytes] = source[begin : begin + row_bytes]
            place += row_bytes
    way(np.array(table, np.int64).reshape(-1, 5))
    np.testing.assert_array_equal(memory, expected)


def test_it_goes_without_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rectangles, "library", lambda: None)
    image, out = np.arange(60, dtype=np.uint8), np.zeros(12, np.uint8)
    copy_rectangles(np.array([(image.ctypes.data + 3, 10, 4, 3, out.ctypes.data)], np.int64))
    assert out.tolist() == [3, 4, 5, 6, 13, 14, 15, 16, 23, 24, 25, 26]
