"""Library: the compiled kernels of `pixels.c`, found beside it and loaded by ctypes, which releases the GIL in calls.

The installation builds the library where there is a C compiler. It names the CRC-32 of the source that it was built
from; one that was built from another source (an old build in a working copy) is not used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import threading
import zlib
from pathlib import Path

log = logging.getLogger("paceline")

FOLDER = Path(__file__).parent
SOURCE = "pixels.c"
STEM = "_pixels"
_lock = threading.Lock()


class Unusable(Exception):  # noqa: N818
    """A library that is missing, cannot be loaded, or is not the one of this version; says which."""


def library() -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be used, which is said in the log once per process."""
    with _lock:
        return _library()


def best_level(kernels: ctypes.CDLL) -> int:
    """Return the best level of vector units that this machine has; 0 is the compiler's own choice for all machines."""
    level: int = kernels.paceline_level()
    return level


def load(folder: Path) -> ctypes.CDLL:
    """Load the library of a folder that holds it and its source. Raises `Unusable`."""
    names = [f"{STEM}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise Unusable("were not built")
    try:
        kernels = ctypes.CDLL(str(path))
        kernels.paceline_source_crc.restype = ctypes.c_uint32
        built_from = kernels.paceline_source_crc()
        wanted = zlib.crc32((folder / SOURCE).read_bytes())
    except (OSError, AttributeError) as error:
        raise Unusable(f"cannot be loaded ({error})") from error
    if built_from != wanted:
        raise Unusable("were built from another version of their source")
    pointer, integer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    kernels.paceline_level.restype = number
    kernels.paceline_level.argtypes = []
    kernels.paceline_jitter.restype = None
    kernels.paceline_jitter.argtypes = [
        *(pointer, integer, pointer, integer),
        *(integer, integer, integer, number),
        *(real, real, real, number),
    ]
    kernels.paceline_gather.restype = None
    kernels.paceline_gather.argtypes = [pointer, integer]
    return kernels


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return load(FOLDER)
    except Unusable as reason:
        log.warning(
            "The compiled pixel kernels %s: OpenCV takes their place and needs about four times as long for colour "
            "jitter. To have them, install a C compiler and install Paceline again.",
            reason,
        )
        return None
