"""Agreement: what the processes of one machine settle once, by a small file that lives as long as one of them does."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.data import locks
from paceline.data.cache_folder import cache_folder

if TYPE_CHECKING:
    from collections.abc import Callable

_PRESENT, _MOST_BYTES = 1 << 62, 1 << 20


def shared_folder() -> Path:
    """Return the folder of this machine and user for what processes share while they run; in memory if possible."""
    shm = Path("/dev/shm")
    folder = (shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())) / f"paceline-{os.getuid()}"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            return folder
    return cache_folder() / "shared"  # somebody else took the name


class Agreement:
    """A word under a name: the first process gives it, the others wait for it and take it over.

    Who dies has left. When all have left, the next one is the first again.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / f"{name}.agreed"
        self._descriptor = -1

    def settle(self, decide: Callable[[], str]) -> tuple[str, bool]:
        """Return the word, and whether this process gave it; raises what `decide` raises, and OSError."""
        assert self._descriptor < 0, "an agreement is settled once"
        while True:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                if locks.try_lock(self._descriptor, _PRESENT):
                    os.ftruncate(self._descriptor, 0)
                    word = decide()
                    os.pwrite(self._descriptor, json.dumps(word).encode(), 0)
                    locks.lock(self._descriptor, _PRESENT, shared=True)
                    if self._is_current():
                        return word, True
                else:
                    locks.lock(self._descriptor, _PRESENT, shared=True)
                    content = os.pread(self._descriptor, _MOST_BYTES, 0)
                    if content and self._is_current():
                        return str(json.loads(content)), False
            except BaseException:
                self.leave()
                raise
            self.leave()  # whoever was first went without a word, or took the file along

    def leave(self) -> None:
        """Be counted no more; the last one removes the file."""
        if self._descriptor < 0:
            return
        if locks.try_lock(self._descriptor, _PRESENT) and self._is_current():
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self._path))
        except OSError:
            return False
