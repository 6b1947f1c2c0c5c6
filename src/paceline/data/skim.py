"""Skim: what of many files needs no second look, read by the native library without holding Python's lock.

What it sets aside (another type of image, a damaged or absent file, a line that is no plain box) is for the readers in
Python, which know all rules and word the findings. Without the library everything is set aside.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.headers import Header
from paceline.native.readers import readers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

IMAGE_FORMATS = ("", "jpeg", "png", "bmp", "webp", "tiff")
"""By the mark of a head; the first is that of files set aside, and the library knows the next two."""

_ROWS = 1 << 13
"""Boxes per call; more than the longest label file that is not set aside (64 KiB) can hold."""


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Headers of N image files."""

    marks: NDArray[np.uint8]
    """N, number of the format in IMAGE_FORMATS; 0 where the file is set aside."""
    sizes: NDArray[np.int32]
    """N2, height and width after EXIF rotation."""
    orientation: NDArray[np.uint8]
    """N, EXIF orientation, 1 to 8."""

    def header(self, number: int) -> Header:
        """Return one of them."""
        height, width = self.sizes[number].tolist()
        form = IMAGE_FORMATS[self.marks[number]]
        return Header(height=height, width=width, orientation=int(self.orientation[number]), format=form)

    def set_header(self, number: int, header: Header) -> None:
        """Fill in one that was set aside."""
        self.marks[number] = IMAGE_FORMATS.index(header.format)
        self.sizes[number] = header.height, header.width
        self.orientation[number] = header.orientation


@dataclass(frozen=True, kw_only=True)
class PlainLabels:
    """M boxes of those among N label files that are plain."""

    plain: NDArray[np.bool_]
    """N, False for files set aside."""
    files: NDArray[np.int64]
    """M, number of the file, rising."""
    labels: NDArray[np.int64]
    lines: NDArray[np.int64]
    """M, from 1."""
    quads: NDArray[np.float64]
    """M4, as they are written."""

    @classmethod
    def none(cls, number: int) -> PlainLabels:
        """Set all of `number` files aside."""
        none = np.zeros(0, np.int64)
        return cls(plain=np.zeros(number, np.bool_), files=none, labels=none, lines=none, quads=np.zeros((0, 4)))


def skim_heads(paths: Sequence[str]) -> Heads:
    """Read the headers of image files."""
    number = len(paths)
    heads = Heads(
        marks=np.zeros(number, np.uint8),
        sizes=np.zeros((number, 2), np.int32),
        orientation=np.ones(number, np.uint8),
    )
    library = readers()
    if library and number:
        library.paceline_read_heads(_packed(paths), number, *_pointers(heads.sizes, heads.orientation, heads.marks))
    return heads


def skim_labels(paths: Sequence[str]) -> PlainLabels:
    """Read label files with lines `class x y width height`."""
    library = readers()
    if not library:
        return PlainLabels.none(len(paths))
    marks = np.zeros(len(paths), np.uint8)
    parts = [PlainLabels.none(0)]
    done = 0
    while done < len(paths):
        files, labels, lines = np.empty((3, _ROWS), np.int64)
        quads = np.empty((_ROWS, 4))
        filled = ctypes.c_int64()
        rest = paths[done:]
        got = library.paceline_read_labels(
            *(_packed(rest), len(rest), _ROWS),
            *_pointers(files, labels, lines, quads, marks[done:]),
            ctypes.byref(filled),
        )
        if not got:  # without memory
            break
        rows = slice(filled.value)
        parts.append(
            PlainLabels(
                plain=np.zeros(0, np.bool_),
                files=files[rows] + done,
                labels=labels[rows],
                lines=lines[rows],
                quads=quads[rows],
            )
        )
        done += int(got)
    return PlainLabels(
        plain=marks.astype(np.bool_),
        files=np.concatenate([part.files for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        lines=np.concatenate([part.lines for part in parts]),
        quads=np.concatenate([part.quads for part in parts]),
    )


def _packed(paths: Sequence[str]) -> bytes:
    """Put file names after each other, each ended by a zero byte; no file name holds one."""
    return os.fsencode("\0".join((*paths, "")))


def _pointers(*arrays: NDArray[Any]) -> tuple[int, ...]:
    assert all(array.flags.c_contiguous for array in arrays)
    return tuple(array.ctypes.data for array in arrays)
