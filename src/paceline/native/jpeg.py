"""JPEG: ordinary baseline files decoded by the compiled decoder, `jpeg.c`, which refuses all others."""

from __future__ import annotations

import ctypes
import logging
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


def decode_jpeg(encoded: bytes, out: Pixels | None = None, reduction: int = 1) -> Pixels | None:
    """Decode a file to pixels HW or HW3 (RGB), in file orientation; in the front of the flat buffer `out` if given.

    Reduced by 1, 2, 4 or 8 to sides that are rounded up. None where the file is refused, where `out` has not the room
    (it may be written to in both cases), and where the library is missing or other decoders are as quick: on machines
    without AVX2.
    """
    library = decoder()
    if library is None or (level := library.paceline_level()) == 0:
        return None
    return decode_at_level(library, encoded, out, level, reduction)


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
    height, width, channels = shape
    pixels = out[: height * width * channels]
    return pixels.reshape((height, width, 3) if channels == 3 else (height, width))
