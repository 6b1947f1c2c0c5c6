"""Rectangles: many copies of rows of bytes, from anywhere in memory into one buffer, as one table of addresses.

A batch computes all addresses at once from where its images lie. The compiled code, `gather.h`, writes past the caches.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np

from paceline.native.library import library

if TYPE_CHECKING:
    from numpy.typing import NDArray

SOURCE, STRIDE, ROW_BYTES, ROWS, TARGET = range(5)


def copy_rectangles(rectangles: NDArray[np.int64]) -> None:
    """Copy N rectangles N5: address and stride of the first row, bytes of a row, rows, address of the dense copy.

    The caller keeps the memory alive; nothing checks the addresses.
    """
    assert rectangles.dtype == np.int64
    assert rectangles.flags.c_contiguous
    kernels = library()
    if kernels is not None:
        kernels.paceline_gather(rectangles.ctypes.data, len(rectangles))
    else:
        copy_by_numpy(rectangles)


def copy_by_numpy(rectangles: NDArray[np.int64]) -> None:
    """Do it without the compiled kernel, one after the other."""
    for source, stride, row_bytes, rows, target in rectangles.tolist():
        if rows == 0 or row_bytes == 0:
            continue
        from_memory = _bytes_at(source, stride * (rows - 1) + row_bytes)
        into_memory = _bytes_at(target, rows * row_bytes).reshape(rows, row_bytes)
        np.copyto(into_memory, np.lib.stride_tricks.as_strided(from_memory, (rows, row_bytes), (stride, 1)))


def _bytes_at(address: int, count: int) -> NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(address))
