"""Stamps: size and time of every file that an index depends on, which tell whether anything changed since."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

Stamps = dict[str, tuple[int, int]]
"""Absolute path -> (bytes, nanoseconds of the last change)."""


def stamp(path: str) -> tuple[int, int] | None:
    """Return the stamp of a file, None where there is no such file; a pipe or device is none, and is never opened."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        return None
    return found.st_size, found.st_mtime_ns


def stamp_file(path: str) -> tuple[int, int]:
    """Return the stamp of a plain file, (0, 0) where there is none; a folder is none."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else (0, 0)


def walk(
    folder: str,
    suffixes: frozenset[str],
    *,
    deep: bool = True,
    visited: list[str] | None = None,
    dangling: list[str] | None = None,
) -> Stamps:
    """Stamp all files under a folder whose ending (in lower case) is among `suffixes`, in the order of their paths.

    Without `deep` only those in the folder itself. Links are followed, each folder once, by its own name if it lies
    here; hidden files and folders are passed over, and so are links to nothing or in a circle. All folders that were
    looked into are added to `visited`, links of these endings that lead to nothing to `dangling`. Raises UserError
    where a folder cannot be read.
    """
    found: list[tuple[str, tuple[int, int]]] = []
    seen: set[tuple[int, int]] = set()
    waiting, links = [folder], list[str]()
    while waiting or links:
        current = waiting.pop() if waiting else links.pop()
        try:
            own = os.stat(current)
            if (own.st_dev, own.st_ino) in seen:
                continue
            seen.add((own.st_dev, own.st_ino))
            if visited is not None:
                visited.append(current)
            with os.scandir(current) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if name[name.rfind(".") :].lower() in suffixes:
                        mark = _stamp_of(entry)
                        if mark:
                            found.append((entry.path, mark))
                            continue
                        if dangling is not None and entry.is_symlink() and _leads_nowhere(entry.path):
                            dangling.append(entry.path)
                            continue
                    if deep and _is_folder(entry):
                        (links if entry.is_symlink() else waiting).append(entry.path)
        except OSError as error:
            raise UserError(f"Cannot read the folder {current}: {error.strerror}; check its permissions.") from error
    found.sort()
    return dict(found)


def fingerprint(root: str, stamps: Stamps, identity: Iterable[str]) -> str:
    """Condense stamps and what else an index depends on; paths count relative to `root`, so a moved set stays valid."""
    state = hashlib.blake2b(digest_size=16)
    state.update("\n".join(identity).encode("utf-8", "surrogateescape") + b"\0")
    prefix = root.rstrip(os.sep) + os.sep
    lines = (f"{path.removeprefix(prefix)}\t{size}\t{time}\n" for path, (size, time) in stamps.items())
    state.update("".join(lines).encode("utf-8", "surrogateescape"))
    return state.hexdigest()


def _stamp_of(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Stamp a file of a folder; None for a folder, or a link to nothing."""
    try:
        if not entry.is_file():
            return None
        found = entry.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _leads_nowhere(path: str) -> bool:
    """Say whether what a link points at is not there; a circle, or what must not be looked at, is something else."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Say whether an entry is a folder, or a link that leads to one."""
    try:
        return entry.is_dir()
    except OSError:
        return False
