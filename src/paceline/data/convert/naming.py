"""Naming: where the images of a data set go in another one: short, safe, and no two in one place."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.raw import is_raw

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_MAGIC = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"II", ".tif"), (b"MM", ".tif"))


class Places:
    """Hands out file names; what differs in its ending alone is kept apart too, as label files have one ending."""

    def __init__(self, names: Iterable[str]) -> None:
        """Take all names of the images, from which the folder that they share is taken away."""
        folders = {os.path.dirname("/".join(_parts(name))) for name in names}
        shared = os.path.commonpath(folders) if folders and all(folders) else ""
        self._num_shared = len(shared.split("/")) if shared else 0
        self._taken: set[str] = set()

    def take(self, name: str, suffix: str) -> str:
        """Return the place of an image: its name where it is free, else with a number behind; always with `suffix`."""
        stem = os.path.splitext("/".join(_parts(name)[self._num_shared :]))[0].rstrip() or "image"
        free, number = stem, 1
        while free in self._taken:
            number += 1
            free = f"{stem}-{number}"
        self._taken.add(free)
        return free + suffix


def suffix_of(name: str, start: bytes) -> str:
    """Return the ending for an image of that name whose content begins with `start`; pixels become PNG."""
    if is_raw(start):
        return ".png"
    suffix = os.path.splitext(name)[1]
    if suffix.lower() in IMAGE_SUFFIXES:
        return suffix
    return next((ending for magic, ending in _MAGIC if start.startswith(magic)), ".bmp")


def _parts(name: str) -> Sequence[str]:
    """Split a name at its folders, without what leads elsewhere, is hidden, or cannot be written into a list."""
    parts = [_UNWRITABLE.sub("_", part).strip() for part in name.split("/")]
    parts = [part for part in parts if part not in ("", ".", "..")]
    return ["_" + part if part.startswith(".") else part for part in parts] or ["image"]
