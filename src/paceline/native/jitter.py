"""Jitter: hue, saturation and value of a picture changed in one pass, mirrored on the way where asked.

The compiled kernel is exact to rounding. OpenCV in its place keeps hue and saturation in 256 steps, which is on average
within 2 of 255 of it.
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

_STRIP_ROWS = 64


def jitter(
    picture: Pixels, hsv: tuple[float, float, float], out: Pixels, *, mirror_x: bool = False, mirror_y: bool = False
) -> None:
    """Write an RGB picture HW3, or one without colour HW, to `out` HW3, which must lie elsewhere.

    `hsv` is the shift of the hue in turns of its circle, and the gains of saturation and value, 0 or more. `mirror_x`
    exchanges left and right, `mirror_y` top and bottom.
    """
    assert out.shape == (*picture.shape[:2], 3)
    assert not np.may_share_memory(picture, out)
    kernels = library()
    if kernels is not None:
        jitter_by_kernel(kernels, picture, hsv, out, mirror_x=mirror_x, mirror_y=mirror_y)
    else:
        jitter_by_opencv(picture, hsv, out, mirror_x=mirror_x, mirror_y=mirror_y)


def jitter_by_kernel(
    kernels: ctypes.CDLL,
    picture: Pixels,
    hsv: tuple[float, float, float],
    out: Pixels,
    *,
    mirror_x: bool = False,
    mirror_y: bool = False,
    level: int | None = None,
) -> None:
    """Do it by the compiled kernel, at the machine's best level of vector units or at a lower one."""
    picture, target = _dense_rows(picture), _dense_rows(out)
    height, width = picture.shape[:2]
    if height == 0 or width == 0:
        return
    top, out_stride = target.ctypes.data, target.strides[0]
    if mirror_y:
        top, out_stride = top + (height - 1) * out_stride, -out_stride
    kernels.paceline_jitter(
        *(picture.ctypes.data, picture.strides[0], top, out_stride),
        *(height, width, 1 if picture.ndim == 2 else 3, mirror_x),
        *(hsv[0] % 1, hsv[1], hsv[2]),
        best_level(kernels) if level is None else min(level, best_level(kernels)),
    )
    if target is not out:
        np.copyto(out, target)


def jitter_by_opencv(
    picture: Pixels, hsv: tuple[float, float, float], out: Pixels, *, mirror_x: bool = False, mirror_y: bool = False
) -> None:
    """Do it by OpenCV, in strips that stay in the core's cache."""
    if mirror_x or mirror_y:
        picture = cv2.flip(picture, -1 if mirror_x and mirror_y else 1 if mirror_x else 0)
    shift, saturation, value = round(hsv[0] * 256) % 256, hsv[1], hsv[2]
    if picture.ndim == 2:  # without colour, only the value of a pixel can change
        np.copyto(out, cv2.cvtColor(cv2.convertScaleAbs(picture, alpha=value), cv2.COLOR_GRAY2RGB))
        return
    if (shift, saturation, value) == (0, 1, 1):
        np.copyto(out, picture)
        return
    for top in range(0, len(picture), _STRIP_ROWS):
        rows = slice(top, top + _STRIP_ROWS)
        planes = list(cv2.split(cv2.cvtColor(picture[rows], cv2.COLOR_RGB2HSV_FULL)))
        planes[0] += np.uint8(shift)  # the hue's circle has 256 steps, so the shift wraps by itself
        cv2.convertScaleAbs(planes[1], dst=planes[1], alpha=saturation)
        cv2.convertScaleAbs(planes[2], dst=planes[2], alpha=value)
        np.copyto(out[rows], cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB_FULL))


def _dense_rows(pixels: Pixels) -> Pixels:
    """Return the pixels with the bytes of each row close together, as they are where they lie so."""
    dense = (3, 1) if pixels.ndim == 3 else (1,)
    return pixels if pixels.strides[1:] == dense else np.ascontiguousarray(pixels)
