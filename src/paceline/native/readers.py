"""Readers: the compiled part of `scan.c`, found beside it and loaded by ctypes, which frees Python's lock in calls.

The installation builds it where there is a C compiler. It names the CRC-32 of the source that it was built from; one
that was built from another source (an old build in a working copy) is not used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
import zlib
from pathlib import Path

SOURCE = "scan.c"
STEM = "_scan"

_log = logging.getLogger("paceline")


def load(folder: Path) -> ctypes.CDLL | str:
    """Load the library of a folder that holds it and its source; return why where it cannot be used."""
    names = [f"{STEM}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return "were not built"
    try:
        readers = ctypes.CDLL(str(path))
        readers.paceline_scan_source_crc.restype = ctypes.c_uint32
        current = readers.paceline_scan_source_crc() == zlib.crc32((folder / SOURCE).read_bytes())
        pointer, integer = ctypes.c_void_p, ctypes.c_int64
        readers.paceline_read_heads.restype = None
        readers.paceline_read_heads.argtypes = [ctypes.c_char_p, integer, *[pointer] * 3]
        readers.paceline_read_labels.restype = integer
        readers.paceline_read_labels.argtypes = [ctypes.c_char_p, integer, integer, *[pointer] * 6]
    except (OSError, AttributeError) as error:
        return f"cannot be loaded ({error})"
    return readers if current else "were built from another version of their source"


@functools.cache
def readers() -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be used, which is said in the log once."""
    found = load(Path(__file__).parent)
    if isinstance(found, str):
        _log.info(
            "The compiled readers of data sets %s: Python takes their place and needs about twice as long for a first "
            "scan. To have them, install a C compiler and install Paceline again.",
            found,
        )
        return None
    return found
