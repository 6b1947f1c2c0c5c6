"""Compiled: libraries of one or a few sources in C beside this file, built with the package, loaded by ctypes.

A call through ctypes frees Python's lock. The build names the CRC-32 of the sources that it was made from; one that was
made from others (an old build in a working copy) is not used, and what it does is done another way.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import logging
import threading
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger("paceline")

FOLDER = Path(__file__).parent


class Unusable(Exception):  # noqa: N818
    """A library that is missing, cannot be loaded, or is not the one of this version; says which."""


@dataclass(kw_only=True)
class Compiled:
    """A library that is looked for when it is first wanted."""

    name: str
    """Of its source, `NAME.c`, and of the build, `_NAME`."""
    what: str
    """What it holds, as the beginning of a sentence; the reason why it cannot be used follows."""
    otherwise: str
    """What is done without it, as a sentence."""
    declare: Callable[[ctypes.CDLL], None]
    """Gives its functions their types."""
    parts: tuple[str, ...] = ()
    """Further files that it is made from, in the order in which setup.py names them."""
    level: int = logging.WARNING
    """Level in the log at which its absence is said."""
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _found: tuple[ctypes.CDLL | None] | None = None

    @property
    def source(self) -> str:
        """Name of the source file."""
        return f"{self.name}.c"

    @property
    def stem(self) -> str:
        """Beginning of the build's name."""
        return f"_{self.name}"

    def get(self) -> ctypes.CDLL | None:
        """Return the library, or None where it cannot be used, which is said in the log once per process."""
        with self._lock:
            if self._found is None:
                self._found = (self._look(),)
            return self._found[0]

    def forget(self) -> None:
        """Look for it again when it is next wanted."""
        self._found = None

    def load(self, folder: Path) -> ctypes.CDLL:
        """Load the library of a folder that holds it and its source. Raises `Unusable`."""
        names = [f"{self.stem}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
        path = next((folder / name for name in names if (folder / name).exists()), None)
        if path is None:
            raise Unusable("were not built")
        try:
            library = ctypes.CDLL(str(path))
            library.paceline_source_crc.restype = ctypes.c_uint32
            built_from = library.paceline_source_crc()
            wanted = zlib.crc32(b"".join((folder / file).read_bytes() for file in (self.source, *self.parts)))
            if built_from == wanted:
                self.declare(library)
        except (OSError, AttributeError) as error:
            raise Unusable(f"cannot be loaded ({error})") from error
        if built_from != wanted:
            raise Unusable("were built from another version of their source")
        return library

    def _look(self) -> ctypes.CDLL | None:
        try:
            return self.load(FOLDER)
        except Unusable as reason:
            log.log(
                self.level,
                "%s %s: %s To have them, install a C compiler and install Paceline again.",
                self.what,
                reason,
                self.otherwise,
            )
            return None
