"""COCO writer: `annotations/instances_<split>.json` and the images in `<split>/`.

Numbers are written with as many digits as it takes to read the same ones again, to the last bit; outlines, which are
float32, with as many as these take. Difficult boxes, which the format does not know, carry `"difficult": 1` besides
`"iscrowd": 1`: other readers leave them out of training and out of the score, as VOC means it, and ours knows them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.convert.naming import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from typing import TextIO

    from numpy.typing import NDArray

    from paceline.data.convert.images import ImageFiles
    from paceline.data.index import Index


def write_coco(
    folder: Path, splits: Mapping[str, ImageFiles], each: Callable[[int, Callable[[int], None]], None]
) -> None:
    """Write a data set; `each(number, work)` calls `work` for all rows of a split, in any order."""
    (folder / "annotations").mkdir(parents=True, exist_ok=True)
    for split, files in splits.items():
        (folder / split).mkdir(exist_ok=True)
        places = Places(files.index.paths)
        taken = [places.take(name, files.suffix(row)) for row, name in enumerate(files.index.paths)]

        def write(row: int, files: ImageFiles = files, taken: list[str] = taken, split: str = split) -> None:
            files.write(row, folder / split / taken[row])

        each(len(taken), write)
        with (folder / "annotations" / f"instances_{split}.json").open("w", encoding="ascii") as stream:
            _write_document(stream, files.index, taken)


def widths(low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sides such that `low + side` is `high` to the last bit, which the difference alone does not promise."""
    sides = high - low
    for _ in range(4):
        missing = high - (low + sides)
        if not missing.any():
            break
        sides = np.where(missing > 0, np.nextafter(sides, np.inf), np.where(missing < 0, np.nextafter(sides, 0), sides))
    return sides


def _write_document(stream: TextIO, index: Index, places: list[str]) -> None:
    """Write the lists one entry per line, never the whole text in memory."""
    categories = (
        {"id": number, "name": name} for number, name in zip(index.category_ids.tolist(), index.names, strict=True)
    )
    stream.write("{")
    for key, entries in (
        ("images", _images(index, places)),
        ("categories", categories),
        ("annotations", _annotations(index)),
    ):
        stream.write(f'{"," if key != "images" else ""}\n"{key}": [')
        _write_entries(stream, entries)
        stream.write("]")
    stream.write("\n}\n")


def _write_entries(stream: TextIO, entries: Iterable[dict[str, Any]]) -> None:
    separator = "\n"
    for entry in entries:
        stream.write(separator + json.dumps(entry))
        separator = ",\n"


def _images(index: Index, places: list[str]) -> Iterator[dict[str, Any]]:
    for number, (height, width), name in zip(index.image_ids.tolist(), index.sizes.tolist(), places, strict=True):
        yield {"id": number, "file_name": name, "height": height, "width": width}


def _annotations(index: Index) -> Iterator[dict[str, Any]]:
    owners = index.image_ids[index.images_of_boxes]
    sides = widths(index.boxes[:, :2], index.boxes[:, 2:])
    for row in range(len(index.labels)):
        entry: dict[str, Any] = {
            "id": row + 1,
            "image_id": int(owners[row]),
            "category_id": int(index.category_ids[index.labels[row]]),
            "bbox": [*index.boxes[row, :2].tolist(), *sides[row].tolist()],
            "area": float(index.area[row]),
            "iscrowd": int(index.crowd[row] or index.difficult[row]),
        }
        outline = index.polygons.outline(row)
        if outline:
            entry["segmentation"] = [[float(text) for text in ring.reshape(-1).astype(str)] for ring in outline]
        if index.difficult[row]:
            entry["difficult"] = 1
        yield entry
