"""Images of a data set on their way into another one: copied or linked, never encoded anew."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import cv2

from paceline.data.convert.naming import suffix_of
from paceline.data.headers import BadImage
from paceline.data.pack.store import store_of
from paceline.data.raw import from_raw, is_raw
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.data.index import Index


class ImageFiles:
    """The images of an index as files; pixels of a decoded pack are written as PNG, which changes none of them."""

    def __init__(self, index: Index, *, link: bool) -> None:
        self.index = index
        self._link = link
        self._store = store_of(index)
        self._decoded = index.packed is not None and index.packed.pack.decoded

    def key(self, row: int) -> str:
        """Name what an image is copied from; the same in two splits where it is the same."""
        packed = self.index.packed
        return str(self.index.path(row)) if packed is None else str(packed.entries[self.index.origins[row]])

    def suffix(self, row: int) -> str:
        """Return the ending that the file of an image gets."""
        name = self.index.paths[row]
        suffix = suffix_of(name, b"")
        known = suffix == os.path.splitext(name)[1] and not self._decoded
        return suffix if known else suffix_of(name, self._store.read(row)[:64])

    def write(self, row: int, path: Path) -> None:
        """Write an image. Raises BadImage where it cannot be read, OSError where it cannot be written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._link and self.index.packed is None:
            try:
                os.link(os.path.realpath(self.index.path(row)), path)
                return
            except FileNotFoundError:
                pass  # the store says it better
            except OSError:
                shutil.copyfile(self.index.path(row), path)  # another file system, or one without links
                return
        try:
            content = self._store.read(row)
        except BadImage as error:
            raise BadImage(f"{self.index.paths[row]} {error}") from error
        if is_raw(content):
            pixels, _ = from_raw(content)
            encoded, png = cv2.imencode(".png", pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))
            assert encoded
            content = png.tobytes()
        with path.open("wb") as stream:
            stream.write(content)


def require_convertible(index: Index, *, link: bool) -> None:
    """Raise UserError for a pack whose images are no files that could be written."""
    pack = index.packed.pack if index.packed else None
    if pack is not None and link:
        raise UserError(f"{pack.address} is a pack, and its images are no files that could be linked; leave out link.")
    if pack is not None and pack.imgsz:
        raise UserError(
            f"{pack.address} holds images that were reduced for imgsz={pack.imgsz}, to which its boxes do not fit; "
            "convert the data set that it was made from."
        )
