"""Medium: where the bytes of a pack come from; here, a file of this machine."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Protocol

from paceline.data import cache_folder as package_cache
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

MOST_HELD_BYTES = 64 << 20
"""Tables up to this size, those of some 100,000 images, are held in memory; larger ones are mapped."""
_BLOCK_BYTES = 8 << 20

_log = logging.getLogger("paceline")


class ShortReadError(OSError):
    """There are fewer bytes than the pack says."""


class Medium(Protocol):
    """A pack's bytes; threads read beside each other."""

    @property
    def address(self) -> str:
        """What the user calls it."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole file."""

    def head(self, length: int) -> bytes:
        """Return the first bytes; fewer where the file is shorter. Called once, before all else."""

    def map(self, start: int, end: int) -> memoryview:
        """Return a part as memory, which is no part of a file that others may cut off. Raises ShortReadError."""

    def read(self, start: int, length: int) -> bytes:
        """Return a part. Raises OSError, and UserError where there is no reading on from this pack."""

    @property
    def version(self) -> int:
        """Another number once the content may have become another since the pack was opened."""

    def forget(self, start: int, length: int) -> bool:
        """Give up copies of a part that turned out to be damaged; False where there are none to give up."""

    def close(self) -> None:
        """Let go of the file."""


class LocalFile:
    """A file. Parts are read by position, so that one that is cut off while in use is an error and no signal.

    A file that is written over has another time of its last change, and soon another size.
    """

    _descriptor = -1  # until it is open: what cannot be opened is let go of like anything else

    def __init__(self, path: Path, cache_folder: Path | None = None) -> None:
        self.address = str(path)
        self._cache_folder = cache_folder
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        found = os.fstat(self._descriptor)
        self.num_bytes, self.version = found.st_size, found.st_mtime_ns

    def head(self, length: int) -> bytes:
        """Return the first bytes."""
        return os.pread(self._descriptor, length, 0)

    def map(self, start: int, end: int) -> memoryview:
        """Copy a part: into memory if it is small, else into a file without a name, which is mapped.

        A mapped file that another program cuts off is a signal (SIGBUS), and no error, at the next look at it.
        """
        if end > self.num_bytes:
            raise ShortReadError(f"{self.address} has {self.num_bytes:,} bytes")
        if end - start > MOST_HELD_BYTES:
            try:
                return self._map_copy(start, end)
            except ShortReadError:
                raise
            except OSError as error:
                _log.warning(
                    "%s: its tables (%.0f MB) cannot be copied into the cache folder (%s), so they are held in memory.",
                    self.address,
                    (end - start) / 1e6,
                    error.strerror or error,
                )
        return memoryview(read_exactly(self._descriptor, start, end - start))

    def _map_copy(self, start: int, end: int) -> memoryview:
        """Map a copy of a part, in a file that is gone as soon as nothing looks at it any more."""
        folder = self._cache_folder or package_cache.cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as copy:
            for first in range(start, end, _BLOCK_BYTES):
                content = read_exactly(self._descriptor, first, min(_BLOCK_BYTES, end - first))
                if copy.write(content) != len(content):
                    raise OSError("the disk is full")
            return map_file(copy.fileno(), 0, end - start)

    def read(self, start: int, length: int) -> bytes:
        """Read a part; raises UserError where the file has another size than when it was opened."""
        content = None
        with contextlib.suppress(ShortReadError):
            content = read_exactly(self._descriptor, start, length)
        found = os.fstat(self._descriptor)
        if content is None or found.st_size != self.num_bytes:
            raise UserError(
                f"{self.address} was cut off or written over while it was in use ({found.st_size:,} bytes where there "
                f"were {self.num_bytes:,}); copy or make the pack anew, and start again."
            )
        self.version = found.st_mtime_ns
        return content

    def forget(self, start: int, length: int) -> bool:
        """Nothing is copied."""
        return False

    def close(self) -> None:
        """Close the file; what is mapped stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


def map_file(descriptor: int, start: int, end: int) -> memoryview:
    """Map the bytes from `start` to `end` of an open file, whatever the size of the machine's pages."""
    if start == end:
        return memoryview(b"")
    first = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    return memoryview(mmap.mmap(descriptor, end - first, access=mmap.ACCESS_READ, offset=first))[start - first :]


def let_go(mapped: memoryview) -> None:
    """Take the pages of a mapped part out of this process's memory until they are looked at again."""
    base = mapped.obj
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        base.madvise(mmap.MADV_DONTNEED)


def read_exactly(descriptor: int, start: int, length: int) -> bytes:
    """Read by position; raises ShortReadError where the file ends before."""
    parts = []
    while length > 0:
        part = os.pread(descriptor, length, start)
        if not part:
            raise ShortReadError("ends too early")
        parts.append(part)
        start, length = start + len(part), length - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
