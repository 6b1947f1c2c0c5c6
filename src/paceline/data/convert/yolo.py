"""YOLO writer: `data.yaml`, `images/<split>/` and `labels/<split>/`.

Numbers are shares of the image with 14 digits behind the point, less zeros at the end: what came from a file with at
most as many digits is written with the same digits again, and corners move by less than 2e-14 of a side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import yaml

from paceline.data.convert.naming import Places
from paceline.data.formats.yolo import label_path

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.convert.images import ImageFiles
    from paceline.data.index import Index

DIGITS = 14


def write_yolo(
    folder: Path, splits: Mapping[str, ImageFiles], each: Callable[[int, Callable[[int], None]], None]
) -> None:
    """Write a data set; `each(number, work)` calls `work` for all rows of a split, in any order."""
    names: tuple[str, ...] = ()
    for split, files in splits.items():
        names = files.index.names
        (folder / "images" / split).mkdir(parents=True, exist_ok=True)
        (folder / "labels" / split).mkdir(parents=True, exist_ok=True)
        places = Places(files.index.paths)
        taken = [places.take(name, files.suffix(row)) for row, name in enumerate(files.index.paths)]

        def write(row: int, files: ImageFiles = files, taken: list[str] = taken, split: str = split) -> None:
            image = f"images/{split}/{taken[row]}"
            files.write(row, folder / image)
            label = folder / label_path(image)
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text(_lines(files, row), encoding="ascii")

        each(len(taken), write)
    (folder / "data.yaml").write_text(description(splits, names), encoding="utf-8")


def description(splits: Iterable[str], names: Sequence[str]) -> str:
    """Return the text of a `data.yaml`; letters stay as they are, unless a name has signs that yaml would change."""
    content = {split: f"images/{split}" for split in splits} | {"names": dict(enumerate(names))}
    readable = all(name.isprintable() for name in names)
    text: str = yaml.safe_dump(content, allow_unicode=readable, sort_keys=False)
    return text


def shares(boxes: NDArray[np.float64], size: NDArray[np.int32]) -> NDArray[np.float64]:
    """Turn xyxy pixels M4 of an image of `size` (height, width) into centres and sides M4 as shares of it."""
    scale = size[::-1].astype(np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / 2 / scale, (high - low) / scale], axis=1)


def _lines(files: ImageFiles, row: int) -> str:
    """Write the label file of an image."""
    index, lines = files.index, []
    boxes = np.arange(len(index.labels))[index.slice(row)]
    quads = shares(index.boxes[boxes], index.sizes[row])
    for box, quad in zip(boxes.tolist(), quads.tolist(), strict=True):
        if not (index.crowd[box] or index.difficult[box]):
            ring = ring_of(index, box)
            values = quad if ring is None else (ring / index.sizes[row][::-1]).reshape(-1).tolist()
            lines.append(f"{index.labels[box]} {' '.join(map(_number, values))}\n")
    return "".join(lines)


def ring_of(index: Index, box: int) -> NDArray[np.float64] | None:
    """Return the outline P2 of a box where a line of YOLO can hold it: one ring whose bounds are the box.

    Outlines are float32 and boxes float64: points on the bounds are moved to where the box has them, by less than a
    float32 can tell, so that the box comes back with all of its digits. None where the box has no such outline.
    """
    outline = index.polygons.outline(box)
    if len(outline) != 1 or len(outline[0]) < 3:
        return None
    points, sides = outline[0], index.boxes[box].reshape(2, 2)
    ring = points.astype(np.float64)
    for side, edge in zip(sides, (points.min(axis=0), points.max(axis=0)), strict=True):
        if not np.array_equal(edge, side.astype(np.float32)):
            return None
        ring = np.where(points == edge, side, ring)
    return ring


def _number(value: float) -> str:
    text = f"{value:.{DIGITS}f}".rstrip("0")
    return text + "0" if text.endswith(".") else text
