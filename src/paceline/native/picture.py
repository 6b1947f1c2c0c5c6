"""Picture: training pictures from rectangles of images in one call, resampled, changed in colour, mirrored.

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

__all__ = ["COLUMNS", "LEAST_SIDE", "draw_pictures", "kernels_for_pictures"]

COLUMNS = 9
"""Of a table of tiles."""
_FIELDS = 5
"""Of what compiled code is told of an image."""


def kernels_for_pictures() -> ctypes.CDLL | None:
    """Return the compiled code where it is there, and fast."""
    kernels = library()
    return kernels if kernels is not None and best_level(kernels) >= LEAST_LEVEL else None


def draw_pictures(
    kernels: ctypes.CDLL,
    tiles: NDArray[np.int64],
    images: Sequence[Sequence[Pixels | None]],
    hsv: NDArray[np.float64],
    mirrors: NDArray[np.bool_],
    out: Pixels,
    chosen: Sequence[bool],
    *,
    fill: int,
    level: int | None = None,
) -> list[bool]:
    """Draw B square pictures BHW3 from T tiles each, one over the other, `fill` where none is; return which are drawn.

    tiles: BT9, of each the part of its image (left, top, height, width in pixels), whether that is first averaged over
        2 x 2 pixels (its sides are even then), and where it comes to lie before the picture is mirrored (xyxy). A part
        has at least `LEAST_SIDE` pixels along each side, also when it was averaged.
    images: BT, HW3, or HW without colour; None for tiles that are not there.
    hsv, mirrors: B3 and B2, those of `jitter`, hue shifts from 0 to 1.
    chosen: B; of these the ones are drawn whose images have dense rows.

    Raises MemoryError. A part that does not lie in its image is noticed before anything is read.
    """
    count, size = out.shape[:2]
    assert out.shape == (count, size, size, 3)
    assert tiles.shape == (count, len(images[0]), COLUMNS)
    assert hsv.shape == (count, 3)
    assert mirrors.shape == (count, 2)
    assert all(table.flags.c_contiguous for table in (tiles, hsv, mirrors, out))
    sources, drawn = array("q"), []
    for is_chosen, of_picture in zip(chosen, images, strict=True):
        found = _addresses(of_picture) if is_chosen else None
        drawn.append(found is not None)
        sources.extend(found or [0] * (_FIELDS * len(of_picture)))
    done = kernels.paceline_pictures(
        *(_address(tiles), sources.buffer_info()[0], tiles.shape[1], bytes(drawn)),
        *(_address(hsv), _address(mirrors), count, size),
        *(_address(out), fill, best_level(kernels) if level is None else level),
    )
    if not done:
        raise MemoryError
    assert done > 0, "a tile does not lie in its image, or in the picture"
    return drawn


def _addresses(images: Sequence[Pixels | None]) -> list[int] | None:
    """Address, bytes from row to row, channels, height and width of images; None where rows are not dense."""
    found: list[int] = []
    for image in images:
        if image is None:
            found += (0,) * _FIELDS
            continue
        channels, about = 3 if image.ndim == 3 else 1, image.__array_interface__
        strides, (height, width) = about["strides"], about["shape"][:2]  # no strides where all is dense
        if strides is not None and strides[1:] != ((3, 1) if channels == 3 else (1,)):
            return None
        stride = width * channels if strides is None else strides[0]
        found += (about["data"][0], stride, channels, height, width)
    return found


def _address(table: NDArray[np.generic]) -> int:
    address: int = table.__array_interface__["data"][0]
    return address
