"""Losses: what a data set holds and a format cannot, counted before it is dropped."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.convert.yolo import ring_of
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.data.index import Index

_NO_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")


def losses(format: str, splits: Iterable[Index]) -> list[str]:  # noqa: A002
    """Say, with numbers, what `format` (`yolo`, `coco`, `voc` or `pack`) cannot hold of these splits."""
    indexes = tuple(splits)
    if format in ("coco", "pack"):
        return []
    outlines = sum(_lost_outlines(index, format) for index in indexes)
    crowd = sum(int(index.crowd.sum()) for index in indexes)
    difficult = sum(int(index.difficult.sum()) for index in indexes) if format == "yolo" else 0
    areas = sum(int(_own_area(index).sum()) for index in indexes)
    images = sum(int((index.image_ids != np.arange(len(index))).sum()) for index in indexes)
    ids = indexes[0].category_ids
    categories = int((ids != np.arange(len(ids))).sum())
    counted = (
        (crowd, "crowd regions (left out)"),
        (difficult, "difficult boxes (left out)"),
        (outlines, "outlines (their boxes are kept)"),
        (areas, "areas that are not those of the boxes"),
        (images, "image ids"),
        (categories, "category ids"),
    )
    return [f"{number:,} {words}" for number, words in counted if number]


def _lost_outlines(index: Index, format: str) -> int:  # noqa: A002
    """Count the boxes that are kept, but without their outline."""
    kept = ~index.crowd if format == "voc" else index.targets
    rows = np.flatnonzero(kept)
    outlined = rows[index.polygons.outlined(rows)]
    return len(outlined) if format == "voc" else sum(ring_of(index, int(box)) is None for box in outlined)


def require_names(format: str, names: tuple[str, ...]) -> None:  # noqa: A002
    """Raise UserError for class names that `format` cannot hold, since boxes would change their class."""
    for name in names:
        if not name.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise UserError(f"The class name {name!r} is no text that can be written; rename the class.")
    if format != "voc":
        return
    for name in names:
        if not name or name.strip() != name or name.splitlines() != [name] or _NO_XML.search(name):
            raise UserError(
                f"The class name {name!r} cannot be kept in Pascal VOC, which takes blanks and line breaks off; rename "
                "the class, or choose another format."
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(
            f"Two classes are called {twice!r}, and Pascal VOC tells classes by their names; rename one of them."
        )


def _own_area(index: Index) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """M, True where a box that is kept has an area of its own, such as that of its outline."""
    sides = index.boxes[:, 2:] - index.boxes[:, :2]
    areas = sides[:, 0] * sides[:, 1]
    own: np.ndarray[tuple[int], np.dtype[np.bool_]] = np.abs(index.area - areas) > 1e-9 * areas
    return own & ~index.crowd
