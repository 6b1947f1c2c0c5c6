"""Library: the compiled kernels for pixels, `pixels.c`."""

from __future__ import annotations

import ctypes

from paceline.native.compiled import Compiled


def _declare(kernels: ctypes.CDLL) -> None:
    pointer, integer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    kernels.paceline_level.restype = number
    kernels.paceline_level.argtypes = []
    kernels.paceline_jitter.restype = None
    kernels.paceline_jitter.argtypes = [
        *(pointer, integer, pointer, integer),
        *(integer, integer, integer, number),
        *(real, real, real, number),
    ]
    kernels.paceline_pictures.restype = number
    kernels.paceline_pictures.argtypes = [
        *(pointer, pointer, integer, pointer),
        *(pointer, pointer, integer, integer),
        *(pointer, number, number),
    ]
    kernels.paceline_resample.restype = number
    kernels.paceline_resample.argtypes = [*(pointer, integer, number, number) * 2, number, number]
    kernels.paceline_gather.restype = None
    kernels.paceline_gather.argtypes = [pointer, integer]


PIXELS = Compiled(
    name="pixels",
    what="The compiled pixel kernels",
    otherwise="OpenCV takes their place and needs three to four times as long.",
    declare=_declare,
    parts=("levels.h", "jitter.h", "resample.h", "halve.h", "picture.h", "gather.h"),
)


def library() -> ctypes.CDLL | None:
    """Return the kernels, or None where they cannot be used, which is said in the log once per process."""
    return PIXELS.get()


def best_level(kernels: ctypes.CDLL) -> int:
    """Return the best level of vector units that this machine has; 0 is the compiler's own choice for all machines."""
    level: int = kernels.paceline_level()
    return level
