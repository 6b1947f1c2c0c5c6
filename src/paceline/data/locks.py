"""Locks: byte ranges of an open file that one opener holds at a time; the system frees those of a dead process.

They belong to the open file (`F_OFD_SETLK` of Linux), so two openers exclude each other within one process too, and
closing another descriptor of the same file frees nothing. Threads that share a descriptor share its locks.
"""

from __future__ import annotations

import errno
import struct

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AVAILABLE = hasattr(fcntl, "F_OFD_SETLK")
_FLOCK = struct.Struct("@hhqqi0q")  # type, whence, start, length, pid: `struct flock` with 64-bit offsets


def lock(descriptor: int, start: int, length: int = 1, *, shared: bool = False) -> None:
    """Wait for a range of bytes, and hold it; a range that is held already changes to this kind."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _request(fcntl.F_RDLCK if shared else fcntl.F_WRLCK, start, length))


def try_lock(descriptor: int, start: int, length: int = 1) -> bool:
    """Hold a range for oneself where nobody else holds any of it, and return whether that is so."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _request(fcntl.F_WRLCK, start, length))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(descriptor: int, start: int, length: int = 1) -> None:
    """Let a range go."""
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _request(fcntl.F_UNLCK, start, length))


def _request(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, 0, start, length, 0)
