"""Picture: a training picture from rectangles of images in one call, resampled, changed in colour, mirrored.

The compiled code, `picture.h`, gives the bytes that `resample` and `jitter` give one after the other.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from paceline.native.library import best_level, library
from paceline.native.resample import LEAST_LEVEL, LEAST_SIDE

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

__all__ = ["COLUMNS", "LEAST_SIDE", "draw_picture", "kernels_for"]

COLUMNS = 9
"""Of a table of tiles."""


def kernels_for(images: Sequence[Pixels | None]) -> ctypes.CDLL | None:
    """Return the compiled code where it is fast and takes these images: dense rows, colour in all or in none."""
    kernels = library()
    if kernels is None or best_level(kernels) < LEAST_LEVEL:
        return None
    strides = {image.strides[1:] for image in images if image is not None}
    return kernels if strides in ({(3, 1)}, {(1,)}, set()) else None


def draw_picture(
    kernels: ctypes.CDLL,
    tiles: NDArray[np.int64],
    images: Sequence[Pixels | None],
    hsv: tuple[float, float, float],
    out: Pixels,
    *,
    fill: int,
    mirror_x: bool = False,
    mirror_y: bool = False,
    level: int | None = None,
) -> None:
    """Draw tiles into a square picture HW3, one over the other, `fill` where none is.

    tiles: T9, of each the part of its image (left, top, height, width in pixels), whether that is first averaged over
        2 x 2 pixels (its sides are even then), and where it comes to lie before the picture is mirrored (xyxy). A part
        has at least `LEAST_SIDE` pixels along each side, also when it was averaged.
    images: T that suit `kernels_for`, HW3, or HW without colour; None for tiles that are not there.
    `hsv` and mirrors are those of `jitter`. Raises MemoryError.
    """
    size = len(out)
    assert out.shape == (size, size, 3)
    assert out.strides[1:] == (3, 1)
    assert tiles.shape == (len(images), COLUMNS)
    assert tiles.flags.c_contiguous
    sources, channels = array("q"), 1
    for image in images:
        if image is None:
            sources.extend((0, 0))
        else:
            sources.extend((image.__array_interface__["data"][0], image.strides[0]))
            channels = 3 if image.ndim == 3 else 1
    start, stride = out.__array_interface__["data"][0], out.strides[0]
    if mirror_y:
        start, stride = start + (size - 1) * stride, -stride
    done = kernels.paceline_picture(
        *(tiles.__array_interface__["data"][0], sources.buffer_info()[0], len(images), channels),
        *(size, start, stride, mirror_x),
        *(hsv[0] % 1, hsv[1], hsv[2], fill, best_level(kernels) if level is None else level),
    )
    if not done:
        raise MemoryError
