"""Coherence: whether the columns of a split fit together; a reader relies on it, whatever their checksums say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.pack.layout import TornPackError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


def require_coherence(
    columns: Mapping[str, NDArray[Any]], num_images: int, num_boxes: int, num_entries: int, num_classes: int
) -> None:
    """Raise TornPackError where a column has another length than the others need, or leads out of them."""
    num_points, num_rings = len(columns["polygons.points"]), len(columns["polygons.rings"]) - 1
    shapes = {
        "paths.offsets": (num_images + 1,),
        "sizes": (num_images, 2),
        "orientation": (num_images,),
        "offsets": (num_images + 1,),
        "boxes": (num_boxes, 4),
        "labels": (num_boxes,),
        "crowd": (num_boxes,),
        "difficult": (num_boxes,),
        "area": (num_boxes,),
        "image_ids": (num_images,),
        "entries": (num_images,),
        "polygons.points": (num_points, 2),
        "polygons.boxes": (num_boxes + 1 if num_rings else len(columns["polygons.boxes"]),),
    }
    for name, shape in shapes.items():
        _require(columns[name].shape == shape, name)
    for name, last in (
        ("paths.offsets", len(columns["paths.blob"])),
        ("offsets", num_boxes),
        ("polygons.rings", num_points),
        ("polygons.boxes", num_rings),
    ):
        offsets = columns[name]
        if len(offsets) or name != "polygons.boxes":
            _require(len(offsets) > 0 and offsets[0] == 0 and offsets[-1] == last, name)
            _require(bool(np.all(offsets[1:] >= offsets[:-1])), name)
    for name, limit in (("entries", num_entries), ("labels", num_classes)):
        values = columns[name]
        _require(not len(values) or (values.min() >= 0 and values.max() < limit), name)


def require_entries(columns: Mapping[str, NDArray[Any]], first: int, end: int) -> None:
    """Raise TornPackError where the columns of the entries differ in length, or an entry leads out of the images."""
    starts, lengths = columns["starts"], columns["lengths"]
    for name, column in columns.items():
        _require(column.ndim == 1 and len(column) == len(starts), name)
    _require(bool(np.all((starts >= first) & (starts <= end))), "starts")
    _require(bool(np.all(lengths <= end - starts)), "lengths")


def _require(fits: bool, name: str) -> None:
    if not fits:
        raise TornPackError(f"has a column {name} that does not fit the others")
