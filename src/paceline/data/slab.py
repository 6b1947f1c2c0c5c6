r"""Slab: arrays of different shapes one after the other in one mapped memory, each written once by whoever comes first.

    byte   0   header: magic, version, number of arrays, end of what is used, end of what is reserved
          64   table, 40 bytes for each array: offset, stamp, height, width, planes, crc, check, state
         ...   padding to a whole page
        data   arrays, in the order in which they were written, each from a multiple of 64 bytes

The memory is that of one process, or a file that processes share and that may be kept. An array takes as many bytes as
it has, so images without colour take a third; a file grows by what the disk has reserved for it, so a full disk is an
answer here and never a signal that ends the process (file systems that compress or copy on write cannot promise it).

Of a kept file nothing is believed: `check` covers an entry of the table, `crc` its bytes, `stamp` says from what it was
made, and an entry that fails is written anew. Locks on bytes far behind the data make processes take turns.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import zlib
from typing import TYPE_CHECKING

import numpy as np

from paceline.data import locks
from paceline.data.slab_file import (
    ALIGNMENT,
    EMPTY,
    ENTRY,
    FIRST_ARRAY,
    HEADER,
    HEADER_BYTES,
    PLACED,
    SPACE,
    WRITTEN,
    SlabFile,
    check_of,
    data_start,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_GROWTH_BYTES = 64 << 20


class Slab:
    """`count` arrays of uint8, HW or HW3, of at most `capacity` bytes together with their alignment.

    `open` shares a file, without it the memory is of this process alone.
    """

    def __init__(self, count: int, capacity: int, *, file: SlabFile | None = None) -> None:
        self._file = file
        self._data_start = data_start(count)
        length = self._data_start + -(-capacity // ALIGNMENT) * ALIGNMENT
        self._limit = length
        self._memory = file.map(length) if file is not None else None
        self.bytes: NDArray[np.uint8] = (
            np.zeros(length, np.uint8) if self._memory is None else np.frombuffer(self._memory, np.uint8)
        )
        self._header = self.bytes[: HEADER.itemsize].view(HEADER)
        self._table = self.bytes[HEADER_BYTES : HEADER_BYTES + count * ENTRY.itemsize].view(ENTRY)
        if file is None:
            self._header["used"] = self._data_start
        self._views: list[NDArray[np.uint8] | None] = [None] * count
        self._space = threading.Lock()
        self.full = ""
        """Why nothing more can be written; empty as long as there is room."""

    @classmethod
    def open(cls, path: Path, count: int, capacity: int, *, kept: bool) -> Slab:
        """Share the file `path`, made anew where it is missing, of another version or not whole.

        Unless `kept`, the last user removes it. Raises OSError where the file cannot be made.
        """
        file = SlabFile(path, count, kept=kept)
        try:
            return cls(count, capacity, file=file)
        except BaseException:
            file.close()
            raise

    def get(self, number: int) -> NDArray[np.uint8] | None:
        """Array that this process has seen whole, without a lock; None for any other.

        Raises UserError, as `claim` does, where the file was cut off since.
        """
        found = self._views[number]
        if found is not None and self._file is not None:
            self._file.require_whole()
        return found

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[None]:
        """Hold an array against other processes; threads of this one must not claim the same at once."""
        if self._file is None:
            yield
            return
        locks.lock(self._file.descriptor, FIRST_ARRAY + number)
        try:
            self._file.require_whole()
            yield
        finally:
            locks.unlock(self._file.descriptor, FIRST_ARRAY + number)

    def load(self, number: int, stamp: int = 0) -> NDArray[np.uint8] | None:
        """Array as it was written from what had this stamp; None where it is missing or not whole. Needs the claim."""
        entry = self._table[number]
        if entry["state"] != WRITTEN or not self._is_placed(number) or entry["stamp"] != stamp:
            return None
        view = self._view(number)
        if self._memory is not None and self._file is not None and self._file.kept:
            start = int(entry["offset"]) // mmap.PAGESIZE * mmap.PAGESIZE
            if hasattr(mmap, "MADV_WILLNEED"):  # one long read, not one for every few pages
                self._memory.madvise(mmap.MADV_WILLNEED, start, int(entry["offset"]) + view.size - start)
            if zlib.crc32(view.data) != entry["crc"]:
                return None
        self._views[number] = view
        return view

    def store(self, number: int, array: NDArray[np.uint8], stamp: int = 0) -> NDArray[np.uint8] | None:
        """Write an array and return the written one; None where there is no room. Needs the claim."""
        entry = self._table[number]
        entry["state"] = EMPTY if entry["state"] == EMPTY else PLACED
        height, width, planes = array.shape[0], array.shape[1], 1 if array.ndim == 2 else array.shape[2]
        placed = self._is_placed(number) and entry["state"] == PLACED
        if not placed or _num_bytes(entry) != array.size:
            offset = self._take(array.size)
            if offset is None:
                return None
            entry["offset"] = offset
        entry["stamp"], entry["height"], entry["width"], entry["planes"] = stamp, height, width, planes
        entry["check"] = self._check(number)
        entry["state"] = PLACED
        view = self._view(number)
        np.copyto(view, array)
        if self._file is not None and self._file.kept:
            entry["crc"] = zlib.crc32(view.data)
        entry["state"] = WRITTEN
        self._views[number] = view
        return view

    def reserve(self, size: int) -> bool:
        """Have room set apart for `size` bytes of arrays before they come, and return whether there is."""
        if self._file is None:
            return True
        with self._space, self._turn():
            header = self._header[0]
            end = min(int(header["used"]) + size, self._limit)
            if end > int(header["reserved"]):
                try:
                    self._file.reserve(int(header["used"]), end - int(header["used"]))
                except OSError as error:
                    self.full = f"{self._file.path.parent} takes no more ({error.strerror or error})"
                    return False
                header["reserved"] = end
        return True

    @property
    def used_bytes(self) -> int:
        """Bytes of arrays, table and alignment that are taken so far."""
        return int(self._header["used"][0])

    def table(self) -> NDArray[np.void]:
        """Offset, height, width and planes of all arrays; state `WRITTEN` for those that are written."""
        return self._table

    def close(self) -> None:
        """Leave a shared file; arrays that somebody holds stay readable."""
        if self._file is not None:
            self._file.close()

    def _view(self, number: int) -> NDArray[np.uint8]:
        entry = self._table[number]
        offset, planes = int(entry["offset"]), int(entry["planes"])
        shape = (int(entry["height"]), int(entry["width"]))
        return self.bytes[offset : offset + _num_bytes(entry)].reshape(shape if planes == 1 else (*shape, planes))

    def _check(self, number: int) -> int:
        start = HEADER_BYTES + number * ENTRY.itemsize
        return check_of(self.bytes[start : start + ENTRY.itemsize].data, number)

    def _is_placed(self, number: int) -> bool:
        """Whether an entry of the table is whole, and lies within what is reserved."""
        entry = self._table[number]
        end = int(entry["offset"]) + _num_bytes(entry)
        inside = self._data_start <= int(entry["offset"]) and end <= min(int(self._header["used"][0]), len(self.bytes))
        return entry["state"] != EMPTY and inside and entry["check"] == self._check(number)

    def _take(self, size: int) -> int | None:
        """Offset of `size` new bytes; None where there is no room. What is used grows before anybody uses it."""
        if self.full:
            return None
        with self._space, self._turn():
            header = self._header[0]
            start = int(header["used"])
            end = start + -(-size // ALIGNMENT) * ALIGNMENT
            if end > self._limit:
                self.full = f"the {(self._limit - self._data_start) / 1e9:.1f} GB that it may have are full"
                return None
            if end > int(header["reserved"]):
                try:
                    header["reserved"] = self._reserve(start, end)
                except OSError as error:
                    assert self._file is not None
                    self.full = f"{self._file.path.parent} takes no more ({error.strerror or error})"
                    return None
            header["used"] = end
            return start

    def _reserve(self, start: int, end: int) -> int:
        """Have room set apart from `start` on, to `end` at least, and return its end; raises OSError."""
        ample = min(start + _GROWTH_BYTES, self._limit)
        if self._file is None:
            return self._limit
        if ample > end:
            with contextlib.suppress(OSError):
                self._file.reserve(start, ample - start)
                return ample
        self._file.reserve(start, end - start)
        return end

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        if self._file is None:
            yield
            return
        locks.lock(self._file.descriptor, SPACE)
        try:
            yield
        finally:
            locks.unlock(self._file.descriptor, SPACE)


def _num_bytes(entry: np.void) -> int:
    return int(entry["height"]) * int(entry["width"]) * int(entry["planes"])
