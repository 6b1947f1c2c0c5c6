"""Store: where the encoded bytes of images come from, by the number of the image in the index."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from paceline.data.headers import BadImage
from paceline.data.stamps import stamp
from paceline.native.jpeg import load_jpeg

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paceline.data.index import Index

_JPEG = (".jpg", ".jpeg")


class Store(Protocol):
    """Encoded images; threads call it beside each other."""

    def read(self, number: int) -> bytes:
        """All bytes of an image; raises BadImage where it cannot be read."""

    def stamp(self, number: int) -> tuple[int, int]:
        """Bytes of an image, and a number that is another when its content is; (0, 0) where it is gone."""


class FileStore:
    """The image files that an index names."""

    def __init__(self, index: Index) -> None:
        self._root = os.fspath(index.root)
        self._paths = index.paths

    def read(self, number: int) -> bytes:
        """All bytes of a file; raises BadImage where it cannot be read."""
        try:
            return _content_of(self._path(number))
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error

    def load(self, number: int, most_pixels: int, reduction: int) -> NDArray[np.uint8] | bytes | None:
        """Pixels of an ordinary JPEG that is not turned; else its bytes, or None: `read` says what is wrong with it."""
        path = self._path(number)
        return load_jpeg(path, most_pixels, reduction) if path.lower().endswith(_JPEG) else None

    def stamp(self, number: int) -> tuple[int, int]:
        """Bytes and time of the last change, in nanoseconds, of a file."""
        return stamp(self._path(number)) or (0, 0)

    def _path(self, number: int) -> str:
        return os.path.join(self._root, self._paths[number])


def _content_of(path: str) -> bytes:
    """Read a file by as few calls of the system as there can be.

    In each, a thread gives Python's lock away, and many threads wait to get it back; `open` and `read` make seven.
    """
    file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    try:
        size = os.fstat(file).st_size
        content = os.read(file, size + 1)
        if len(content) == size:  # the end, or it would have been one more
            return content
        parts = [content]
        while parts[-1]:
            parts.append(os.read(file, 1 << 20))
        return b"".join(parts)
    finally:
        os.close(file)
