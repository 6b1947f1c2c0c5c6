"""Readers: the compiled readers of heads of image files and of plain label files, `scan.c`."""

from __future__ import annotations

import ctypes
import logging

from paceline.native.compiled import Compiled


def _declare(readers: ctypes.CDLL) -> None:
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    readers.paceline_read_heads.restype = None
    readers.paceline_read_heads.argtypes = [ctypes.c_char_p, integer, *[pointer] * 3]
    readers.paceline_read_labels.restype = integer
    readers.paceline_read_labels.argtypes = [ctypes.c_char_p, integer, integer, *[pointer] * 6]


READERS = Compiled(
    name="scan",
    what="The compiled readers of data sets",
    otherwise="Python takes their place and needs about twice as long for a first scan.",
    declare=_declare,
    level=logging.INFO,
)


def readers() -> ctypes.CDLL | None:
    """Return the library, or None where it cannot be used, which is said in the log once per process."""
    return READERS.get()
