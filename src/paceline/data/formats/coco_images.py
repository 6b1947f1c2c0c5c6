"""COCO images: where the images are that an annotation file lists."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.findings import Finding
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.stamps import stamp_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.formats.coco_file import CocoFile
    from paceline.data.scan import Listing
    from paceline.data.stamps import Stamps


def find_images(
    coco: CocoFile, folder: str, listing: Listing, name: str
) -> tuple[list[str], NDArray[np.int64], list[Finding], Stamps]:
    """Return the images that are there, their numbers in the file, and findings for those that are not.

    Places that were looked at and that the walk of the folder would not show are returned as stamps, last.
    """
    paths, listed, absent = [], [], []
    outside: Stamps = {}
    seen: set[int] = set()
    for number, (text, image_id) in enumerate(zip(coco.file_names, coco.image_ids.tolist(), strict=True)):
        if image_id in seen:
            continue
        seen.add(image_id)
        for path in places_of(text, folder):
            if path not in listing.stamps:
                mark = stamp_file(path)
                if any(mark) or not (_is_walked(path, folder) or _is_impossible(path)):
                    outside[path] = mark
            if path in listing.stamps or any(outside.get(path, ())):
                paths.append(path)
                listed.append(number)
                break
        else:
            message = f"the image {text} is not in {folder}; put it there, or take it out of `images`"
            absent.append(Finding(kind="absent", file=name, line=0, message=message))
    return paths, np.array(listed, np.int64), absent, outside


def places_of(text: str, folder: str) -> tuple[str, str]:
    """Return where an image may be that the file of a split with this folder of images lists, the likelier first."""
    inside, beside = os.path.join(folder, text), os.path.join(os.path.dirname(folder), text)
    return os.path.normpath(inside), os.path.normpath(beside)


def _is_impossible(path: str) -> bool:
    """Say whether no file can have this path: it holds a zero, or is no text."""
    try:
        return b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        return True


def _is_walked(path: str, folder: str) -> bool:
    """Say whether the walk of the folder would show a file of this path, were it there."""
    prefix = os.path.join(folder, "")
    inner = path.removeprefix(prefix)
    return (
        path.startswith(prefix)
        and f"{os.sep}." not in os.sep + inner
        and os.path.splitext(inner)[1].lower() in IMAGE_SUFFIXES
    )
