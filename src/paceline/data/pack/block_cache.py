"""Block cache: parts of remote packs in files of this machine, shared by its processes.

```
packs/                        in the cache folder
  lock                        held while old blocks are removed
  <address and header>/
    00000007                  a block: CRC-32 and length of its content (<u4 each), then the content
    tables                    the tables of the pack, framed in the same way
    lock-07                   held by the process that fetches block 7, 71, ...
```

A file gets its name when it is whole. One that is torn all the same, after a power failure for instance, has another
checksum, which is compared when a process reads it for the first time; it is fetched again. The blocks of all packs
together are kept under a bound: those that were not used for longest go first. A file's time of change is when it was
last used, by whatever process; each writes it at most once a second for each block that it reads.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from filelock import FileLock

from paceline.data.pack.medium import map_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

log = logging.getLogger("paceline")

_FRAME = np.dtype([("checksum", "<u4"), ("unused", "<u4"), ("length", "<u8")])
_NUM_LOCKS = 64
_LEFT_SHARE = 15 / 16
"""Share of the bound that is left when blocks are removed."""
_USE_NOTED_S = 1.0
"""How far the time of a block's last use may be behind: a note costs less than a read, but not nothing."""


class BlockCache:
    """The blocks of one version of one remote file of `num_bytes`; threads and processes use it beside each other.

    Where nothing can be written, everything is fetched each time, and the log says so once.
    """

    def __init__(self, folder: Path, *, num_bytes: int, block_bytes: int, most_bytes: int) -> None:
        self.folder = folder
        self.num_bytes = num_bytes
        self.block_bytes = block_bytes
        self.most_bytes = most_bytes
        self._used: dict[str, float] = {}
        """The blocks that are known to be sound, and when their use was noted last."""
        self._lock = threading.Lock()
        self._unwatched_bytes = most_bytes  # so that the first block looks at what is there
        self._works = True

    def read(self, start: int, length: int, fetch: Callable[[int, int], bytes]) -> bytes:
        """Return a part of the file; `fetch(start, end)` brings the blocks that are not there."""
        parts = []
        while length > 0:
            number, offset = divmod(start, self.block_bytes)
            step = min(length, self.block_bytes - offset)
            parts.append(self._part(number, offset, step, fetch))
            start, length = start + step, length - step
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def map(self, start: int, end: int, fetch: Callable[[int, int], bytes]) -> memoryview:
        """Return a part of the file that is kept as one: mapped, or in memory where nothing can be written."""
        with self._exclusive("lock-tables"):
            found = self._mapped(end - start)
            if found is None:
                self._write("tables", (fetch(*step) for step in self._steps(start, end)))
                found = self._mapped(end - start)
        if found is not None:
            return found
        return memoryview(b"".join(fetch(*step) for step in self._steps(start, end)))

    def forget(self, start: int, length: int) -> None:
        """Remove the blocks that hold a part of the file."""
        for number in range(start // self.block_bytes, (start + length - 1) // self.block_bytes + 1):
            self._discard(_name(number))

    def _part(self, number: int, offset: int, length: int, fetch: Callable[[int, int], bytes]) -> bytes:
        found = self._stored(_name(number), offset, length)
        if found is not None:
            return found
        with self._exclusive(f"lock-{number % _NUM_LOCKS:02d}"):
            found = self._stored(_name(number), offset, length)  # another process may have been faster
            if found is not None:
                return found
            first = number * self.block_bytes
            content = fetch(first, min(first + self.block_bytes, self.num_bytes))
            self._write(_name(number), [content])
        self._watch(len(content))
        return content[offset : offset + length]

    def _stored(self, name: str, offset: int, length: int) -> bytes | None:
        """Return a part of a stored block; None where it is not there, or torn."""
        try:
            with (self.folder / name).open("rb", buffering=0) as file:
                noted = self._used.get(name)
                if noted is not None:
                    content = os.pread(file.fileno(), length, _FRAME.itemsize + offset)
                    if len(content) == length:
                        if time.monotonic() - noted >= _USE_NOTED_S:
                            self._note_use(name, file.fileno())
                        return content
                else:
                    whole = _unframed(memoryview(file.readall()))
                    if whole is not None:
                        self._note_use(name, file.fileno())
                        return bytes(whole[offset : offset + length])
        except OSError:
            return None
        log.warning("The stored block %s was torn; it is fetched again.", self.folder / name)
        self._discard(name)
        return None

    def _mapped(self, num_bytes: int) -> memoryview | None:
        """Map the stored tables; None where they are not there, or torn."""
        path = self.folder / "tables"
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                content = _unframed(map_file(file.fileno(), 0, size)) if size else None
                if content is not None and len(content) == num_bytes:
                    _touch(file.fileno())
                    return content
        except OSError:
            return None
        log.warning("The stored tables %s were torn; they are fetched again.", path)
        self._discard("tables")
        return None

    def _write(self, name: str, parts: Iterable[bytes]) -> None:
        """Store the parts of a file after each other, under its name when all are there; or say that it is no use."""
        if not self._works:
            return
        scratch = ""
        try:
            descriptor, scratch = tempfile.mkstemp(dir=self.folder, prefix=".")
            with os.fdopen(descriptor, "wb") as file:
                file.write(bytes(_FRAME.itemsize))
                checksum = length = 0
                for part in parts:
                    checksum, length = zlib.crc32(part, checksum), length + len(part)
                    file.write(part)
                file.seek(0)
                file.write(np.array((checksum, 0, length), _FRAME).tobytes())
            os.replace(scratch, self.folder / name)
            self._note_use(name)
        except BaseException as error:
            if scratch:
                Path(scratch).unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            self._give_up(error)

    @contextlib.contextmanager
    def _exclusive(self, name: str) -> Iterator[None]:
        """Hold a lock against all threads and processes; hold none where files cannot be locked."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / name, poll_interval=0.01)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            self._give_up(error)
            yield
            return
        try:
            yield
        finally:
            lock.release()

    def _watch(self, num_bytes: int) -> None:
        """Count what came in, and look at the bound before it can be passed by more than a sixteenth."""
        with self._lock:
            self._unwatched_bytes += num_bytes
            if self._unwatched_bytes < self.most_bytes * (1 - _LEFT_SHARE):
                return
            self._unwatched_bytes = 0
        _touch(self.folder / "tables")  # mapped once, and in use for as long as the pack is
        with self._exclusive("../lock"), contextlib.suppress(OSError):
            remove_oldest(self.folder.parent, self.most_bytes)

    def _note_use(self, name: str, descriptor: int = -1) -> None:
        """Note that a block is sound and used now, in its open file too where there is one."""
        with self._lock:
            self._used[name] = time.monotonic()
        if descriptor >= 0:
            _touch(descriptor)

    def _discard(self, name: str) -> None:
        with self._lock:
            self._used.pop(name, None)
        with contextlib.suppress(OSError):
            (self.folder / name).unlink()

    def _steps(self, start: int, end: int) -> list[tuple[int, int]]:
        return [(first, min(first + self.block_bytes, end)) for first in range(start, end, self.block_bytes)]

    def _give_up(self, error: BaseException) -> None:
        with self._lock:
            said, self._works = not self._works, False
        if not said:
            log.warning(
                "%s cannot be written (%s), so every image is fetched each time; free some space, or set "
                "PACELINE_CACHE to a folder that can be written.",
                self.folder,
                getattr(error, "strerror", None) or error,
            )


def stored_bytes(packs: Path) -> int:
    """Count the bytes of all stored blocks."""
    return sum(size for _, size, _ in _files(packs))


def remove_oldest(packs: Path, most_bytes: int) -> None:
    """Remove the blocks that were not used for longest, where all together have more than `most_bytes`."""
    files = sorted(_files(packs))
    excess = sum(size for _, size, _ in files) - most_bytes
    if excess <= 0:
        return
    excess += int(most_bytes * (1 - _LEFT_SHARE))
    for _, size, path in files:
        if excess <= 0:
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        excess -= size


def _files(packs: Path) -> Iterator[tuple[int, int, str]]:
    """Yield time of use, bytes and path of all blocks and tables, also of those that a killed process left behind."""
    for folder in packs.glob("*/"):
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("lock"):
                    continue
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    yield found.st_mtime_ns, found.st_size, entry.path


def _unframed(whole: memoryview) -> memoryview | None:
    """Return the content of a framed file; None where its length or its checksum is another."""
    if len(whole) < _FRAME.itemsize:
        return None
    frame = np.frombuffer(whole[: _FRAME.itemsize], _FRAME)[0]
    content = whole[_FRAME.itemsize :]
    if len(content) != int(frame["length"]) or zlib.crc32(content) != int(frame["checksum"]):
        return None
    return content


def _touch(file: int | Path) -> None:
    """Make now the time of a file's last use, finer than the clock of file systems; leave what is another user's."""
    now = time.time_ns()
    with contextlib.suppress(OSError):
        os.utime(file, ns=(now, now))


def _name(number: int) -> str:
    return f"{number:08d}"
