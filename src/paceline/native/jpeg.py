"""JPEG: ordinary baseline files decoded by the compiled decoder, `jpeg.c`, which refuses all others."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from typing import TYPE_CHECKING

import numpy as np

from paceline.native.compiled import Compiled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


def _declare(decoder: ctypes.CDLL) -> None:
    pointer, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    decoder.paceline_level.restype = number
    decoder.paceline_level.argtypes = []
    decoder.paceline_jpeg_shape.restype = number
    decoder.paceline_jpeg_shape.argtypes = [ctypes.c_char_p, integer, number, pointer]
    decoder.paceline_jpeg_load.restype = integer
    decoder.paceline_jpeg_load.argtypes = [
        *(ctypes.c_char_p, pointer, integer),
        *(pointer, integer, number, pointer, number),
    ]
    decoder.paceline_jpeg_decode.restype = number
    decoder.paceline_jpeg_decode.argtypes = [ctypes.c_char_p, integer, pointer, integer, number, pointer, number]


JPEG = Compiled(
    name="jpeg",
    what="The compiled decoder of JPEG",
    otherwise="simplejpeg takes its place, with the same pixels, and needs about 1.4 times as long.",
    declare=_declare,
    parts=(
        "jpeg_avx2.c",
        "jpeg.h",
        "jpeg_decode.h",
        "jpeg_entropy.h",
        "jpeg_reduced.h",
        "jpeg_transform.h",
        "jpeg_vectors.h",
    ),
    level=logging.INFO,
)


def decoder() -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be used, which is said in the log once per process."""
    return JPEG.get()


def decode_jpeg(encoded: bytes, reduction: int = 1) -> Pixels | None:
    """Decode a file to pixels HW or HW3 (RGB), in file orientation.

    Reduced by 1, 2, 4 or 8 to sides that are rounded up. None where the file is refused, and where the library is
    missing or other decoders are as quick: on machines without AVX2.
    """
    library = decoder()
    if library is None or (level := _level_of(library)) == 0:
        return None
    return decode_at_level(library, encoded, None, level, reduction)


def load_jpeg(path: str, most_pixels: int, reduction: int = 1) -> Pixels | bytes | None:
    """Read a file and decode it as `decode_jpeg` does, in one call, so that its thread waits once for Python's lock.

    most_pixels: height times width of what is wanted, reduced. Returns pixels; the file's bytes where it has to be
    decoded another way; None where it has to be read another way: large ones, too.
    """
    library = decoder()
    if library is None or (level := _level_of(library)) == 0:
        return None
    shape, file, out = (ctypes.c_int32 * 3)(), _OF_THREAD.file, np.empty(3 * most_pixels, np.uint8)
    told = (file.ctypes.data, file.size, out.ctypes.data, out.size, reduction, shape, level)
    size = library.paceline_jpeg_load(os.fsencode(path), *told)
    if shape[0]:
        pixels = _shaped(out, shape)
        return pixels if pixels.size == out.size else pixels.copy()  # of what has no colour, a third is kept
    return file[:size].tobytes() if 0 <= size <= file.size else None


class _OfThread(threading.local):
    """Memory of each thread."""

    def __init__(self) -> None:
        self.file = np.empty(_FILE_BYTES, np.uint8)


_FILE_BYTES = 2 << 20
_OF_THREAD = _OfThread()


@functools.cache
def _level_of(library: ctypes.CDLL) -> int:
    level: int = library.paceline_level()
    return level


def decode_at_level(
    library: ctypes.CDLL, encoded: bytes, out: Pixels | None, level: int, reduction: int = 1
) -> Pixels | None:
    """Do it at a level of vector units that the machine has, 0 for that of all machines."""
    shape = (ctypes.c_int32 * 3)()
    if out is None:
        if not library.paceline_jpeg_shape(encoded, len(encoded), reduction, shape):
            return None
        out = np.empty(shape[0] * shape[1] * shape[2], np.uint8)
    assert out.ndim == 1
    assert out.flags.c_contiguous
    if not library.paceline_jpeg_decode(encoded, len(encoded), out.ctypes.data, out.size, reduction, shape, level):
        return None
    return _shaped(out, shape)


def _shaped(out: Pixels, shape: ctypes.Array[ctypes.c_int32]) -> Pixels:
    height, width, channels = shape
    pixels = out[: height * width * channels]
    return pixels.reshape((height, width, 3) if channels == 3 else (height, width))
