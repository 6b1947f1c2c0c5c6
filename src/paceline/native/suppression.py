"""Suppression: the greedy rule of non-maximum suppression, compiled, `suppress.c`."""

from __future__ import annotations

import ctypes
import logging
from typing import TYPE_CHECKING

import numpy as np

from paceline.native.compiled import Compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK = 16
"""Boxes that the kernel compares at once."""
PLANES = 6


def _declare(library: ctypes.CDLL) -> None:
    pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
    library.paceline_suppress.restype = None
    library.paceline_suppress.argtypes = [pointer, pointer, integer, integer, real, real, integer, *[pointer] * 3]


SUPPRESSION = Compiled(
    name="suppress",
    what="The compiled suppression kernels",
    otherwise="PyTorch takes their place and needs about ten times as long for suppression on a CPU.",
    declare=_declare,
    level=logging.INFO,
)


def suppress(
    kernel: ctypes.CDLL,
    planes: NDArray[np.float32],
    num_valid: NDArray[np.int64],
    *,
    iou: float,
    eps: float,
    max_det: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Keep boxes of B images by the greedy rule; returns their ranks BD and how many each image has B.

    planes: B6M, boxes of each image from the best to the worst, as x1, y1, x2, y2, area and class (0 or more); finite.
    num_valid: B, how many of the M places hold a box; they are the first ones.
    """
    num_images, num_planes, num_boxes = planes.shape
    assert num_planes == PLANES
    planes, num_valid = np.ascontiguousarray(planes, np.float32), np.ascontiguousarray(num_valid, np.int64)
    assert num_valid.shape == (num_images,)
    assert not num_images or 0 <= num_valid.min() <= num_valid.max() <= num_boxes
    ranks = np.zeros((num_images, max_det), np.int64)
    count = np.zeros(num_images, np.int64)
    kept = np.empty((-(-max_det // BLOCK), PLANES, BLOCK), np.float32)
    kernel.paceline_suppress(
        planes.ctypes.data,
        num_valid.ctypes.data,
        num_images,
        num_boxes,
        iou,
        eps,
        max_det,
        *(array.ctypes.data for array in (kept, ranks, count)),
    )
    return ranks, count
