"""Slab file: the file below a shared or kept slab, how it is laid out, who uses it, and how it is made whole again."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import zlib
from typing import TYPE_CHECKING

import numpy as np

from paceline.data import locks
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

VERSION = 1
_MAGIC = b"paceslab"
HEADER = np.dtype(
    [("magic", "S8"), ("version", "<u4"), ("entry", "<u4"), ("count", "<u8"), ("used", "<u8"), ("reserved", "<u8")]
)
ENTRY = np.dtype(
    [
        ("offset", "<u8"),
        ("stamp", "<u8"),
        ("height", "<u4"),
        ("width", "<u4"),
        ("planes", "<u4"),
        ("crc", "<u4"),
        ("check", "<u4"),
        ("state", "<u4"),
    ]
)
_CHECKED_BYTES = 28
"""Of an entry: all before `crc`."""
EMPTY, PLACED = 0, 1
WRITTEN = 2
"""State of an array that is whole."""
HEADER_BYTES = 64
ALIGNMENT = 64
MOST_LOST = 1 / 32
"""Share of a file's data that belongs to no array any more with which the file is still kept."""
_LOCKS = 1 << 62
"""Where the lock bytes begin: no file is as long. First the users, then the header, then one for each array."""
USERS, SPACE, FIRST_ARRAY = _LOCKS, _LOCKS + 1, _LOCKS + 2


def check_of(entry: memoryview, number: int) -> int:
    """Return the `check` of an array's entry, which begins here: of all before `crc`, and its number."""
    return zlib.crc32(entry[:_CHECKED_BYTES]) ^ number


class SlabFile:
    """An open slab file that this process counts among the users of."""

    def __init__(self, path: Path, count: int, *, kept: bool) -> None:
        self.path = path
        self.kept = kept
        self._count = count
        self._mapped_bytes = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        while not self._enter():
            pass

    def _enter(self) -> bool:
        """Open the file, or make it, and be among its users; False where somebody removed it in between."""
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if locks.try_lock(self.descriptor, USERS):  # nobody else uses it: mend it, then let others in
                self._mend()
            locks.lock(self.descriptor, USERS, shared=True)
            if not _is_whole(self.descriptor, self._count):
                raise OSError(errno.EBUSY, "another run uses it for other images")
            if _is_file(self.descriptor, self.path):
                return True
        except BaseException:
            os.close(self.descriptor)
            raise
        os.close(self.descriptor)
        return False

    def map(self, length: int) -> mmap.mmap:
        """Map the file, grown to `length` without taking room for it yet."""
        locks.lock(self.descriptor, SPACE)
        try:
            length = max(length, os.fstat(self.descriptor).st_size)
            os.ftruncate(self.descriptor, length)
        finally:
            locks.unlock(self.descriptor, SPACE)
        self._mapped_bytes = length
        return mmap.mmap(self.descriptor, length)

    def require_whole(self) -> None:
        """Raise UserError where the file has become shorter than what is mapped of it: a look there would be a signal.

        One call to the system, of a third of a microsecond; a cut between it and the look still is one (SIGBUS).
        """
        if self.descriptor >= 0 and os.lseek(self.descriptor, 0, os.SEEK_END) < self._mapped_bytes:
            raise UserError(
                f"{self.path} was cut off by another program while it was in use; remove the file if it is still "
                "there, and start again."
            )

    def reserve(self, start: int, length: int) -> None:
        """Let the disk set bytes apart; raises OSError where it has no room."""
        os.posix_fallocate(self.descriptor, start, length)

    def close(self) -> None:
        """Leave, and remove the file where nobody is left and it is not to be kept."""
        if self.descriptor < 0:
            return
        if not self.kept and locks.try_lock(self.descriptor, USERS):
            with contextlib.suppress(OSError):
                self.path.unlink()
        locks.unlock(self.descriptor, USERS)
        os.close(self.descriptor)
        self.descriptor = -1

    def _mend(self) -> None:
        """Make the file good to use: a new header and an empty table, or the old ones with what is left of the data.

        An array whose entry was damaged, or that has become larger, is written to a new place, and its old one is lost.
        """
        start = data_start(self._count)
        if not _is_whole(self.descriptor, self._count):
            self._begin()
            return
        length = os.fstat(self.descriptor).st_size
        size = self._count * ENTRY.itemsize
        table = np.frombuffer(os.pread(self.descriptor, size, HEADER_BYTES), ENTRY).copy()
        rows = memoryview(table.tobytes())
        checks = (check_of(rows[number * ENTRY.itemsize :], number) for number in range(self._count))
        sound = table["check"] == np.fromiter(checks, np.uint32, self._count)
        ends = table["offset"] + np.uint64(1) * table["height"] * table["width"] * table["planes"]
        inside = sound & (table["state"] != EMPTY) & (table["offset"] >= start) & (ends <= length)
        table["state"][~inside] = EMPTY  # what was cut off or damaged; other arrays will lie there
        os.pwrite(self.descriptor, table.tobytes(), HEADER_BYTES)
        used = max(int(ends[inside].max(initial=0)), start)
        taken = -(-(ends - table["offset"])[inside].astype(np.int64) // ALIGNMENT) * ALIGNMENT
        if used - start - int(taken.sum()) > MOST_LOST * (used - start):
            self._begin()
            return
        header = np.frombuffer(os.pread(self.descriptor, HEADER.itemsize, 0), HEADER).copy()
        header["used"] = header["reserved"] = -(-used // ALIGNMENT) * ALIGNMENT
        os.pwrite(self.descriptor, header.tobytes(), 0)

    def _begin(self) -> None:
        """Write a new header and an empty table, and no data."""
        start = data_start(self._count)
        os.ftruncate(self.descriptor, 0)
        os.ftruncate(self.descriptor, start)
        os.posix_fallocate(self.descriptor, 0, start)
        header = np.zeros(1, HEADER)
        header["magic"], header["version"], header["entry"] = _MAGIC, VERSION, ENTRY.itemsize
        header["count"], header["used"], header["reserved"] = self._count, start, start
        os.pwrite(self.descriptor, header.tobytes(), 0)


def remove_unused(path: Path) -> bool:
    """Remove a slab file that no living process uses, and return whether that is so."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not locks.try_lock(descriptor, USERS):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _is_whole(descriptor: int, count: int) -> bool:
    """Whether the header is ours, of this version, and the table is all there."""
    if os.fstat(descriptor).st_size < data_start(count):
        return False
    header = np.frombuffer(os.pread(descriptor, HEADER.itemsize, 0), HEADER)[0]
    expected = (_MAGIC, VERSION, ENTRY.itemsize, count)
    return (bytes(header["magic"]), header["version"], header["entry"], header["count"]) == expected


def data_start(count: int) -> int:
    """Return where the arrays begin: at a whole page behind the table."""
    return -(-(HEADER_BYTES + count * ENTRY.itemsize) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
