"""Store: where the encoded bytes of images come from, by the number of the image in the index."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Protocol

from paceline.data.headers import BadImage
from paceline.data.stamps import stamp

if TYPE_CHECKING:
    from paceline.data.index import Index


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
            with open(self._path(number), "rb", buffering=0) as file:
                return file.read() or b""
        except (OSError, ValueError) as error:
            raise BadImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from error

    def stamp(self, number: int) -> tuple[int, int]:
        """Bytes and time of the last change, in nanoseconds, of a file."""
        return stamp(self._path(number)) or (0, 0)

    def _path(self, number: int) -> str:
        return os.path.join(self._root, self._paths[number])
