"""Resample: a rectangle of pixels drawn larger or smaller by linear interpolation.

The compiled code, `resample.h`, is within 1.04 of 255 of what is exact, rounding included; OpenCV in its place, .9.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from paceline.native.library import best_level, library

if TYPE_CHECKING:
    import ctypes

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

LEAST_LEVEL = 2
"""Of vector units, AVX2: below it OpenCV is faster."""
LEAST_SIDE = 2
"""Of a source that the compiled code takes: each pixel lies between two."""
_MOST_SIDE = 1 << 20
"""Of a source: places in a row are numbers of 32 bits."""


def resample(source: Pixels, out: Pixels) -> None:
    """Draw pixels HW or HW3 into `out`, which has as many channels and lies elsewhere; both may be views.

    Centres of pixels lie half a pixel inside of their edges, and beyond the outermost ones nothing changes.
    """
    assert source.shape[2:] == out.shape[2:]
    if out.size == 0:
        return
    kernels = library()
    level = best_level(kernels) if kernels is not None else 0
    if kernels is None or level < LEAST_LEVEL or not _fits(source, out):
        resample_by_opencv(source, out)
    else:
        resample_by_kernel(kernels, source, out, level)


def resample_by_kernel(kernels: ctypes.CDLL, source: Pixels, out: Pixels, level: int) -> None:
    """Do it by the compiled code, at a level of vector units that the machine has, 0 for that of all machines."""
    height, width = out.shape[:2]
    channels = 3 if source.ndim == 3 else 1
    done = kernels.paceline_resample(
        *(source.ctypes.data, source.strides[0], *source.shape[:2]),
        *(out.ctypes.data, out.strides[0], height, width),
        *(channels, level),
    )
    if not done:
        raise MemoryError


def resample_by_opencv(source: Pixels, out: Pixels) -> None:
    """Do it by OpenCV."""
    _resize(source, out, cv2.INTER_LINEAR)


def resample_by_area(source: Pixels, out: Pixels) -> None:
    """Draw pixels smaller, each the mean of those that it covers."""
    _resize(source, out, cv2.INTER_AREA)


def _resize(source: Pixels, out: Pixels, how: int) -> None:
    drawn = cv2.resize(source, (out.shape[1], out.shape[0]), dst=out, interpolation=how)
    assert drawn is out or np.shares_memory(drawn, out)


def _fits(source: Pixels, out: Pixels) -> bool:
    """Whether the compiled code takes them: pixels of a row side by side, and enough of them."""
    dense = (3, 1) if source.ndim == 3 else (1,)
    return (
        source.strides[1:] == out.strides[1:] == dense
        and source.ndim in (2, 3)
        and min(source.shape[:2]) >= LEAST_SIDE
        and max(*source.shape[:2], *out.shape[:2]) <= _MOST_SIDE
    )
