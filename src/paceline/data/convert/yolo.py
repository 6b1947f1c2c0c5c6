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
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.convert.images import ImageFiles

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
    content = {split: f"images/{split}" for split in splits} | {"names": dict(enumerate(names))}
    text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False)
    (folder / "data.yaml").write_text(text, encoding="utf-8")


def shares(boxes: NDArray[np.float64], size: NDArray[np.int32]) -> NDArray[np.float64]:
    """Turn xyxy pixels M4 of an image of `size` (height, width) into centres and sides M4 as shares of it."""
    scale = size[::-1].astype(np.float64)
    low, high = boxes[:, :2], boxes[:, 2:]
    return np.concatenate([(low + high) / 2 / scale, (high - low) / scale], axis=1)


def _lines(files: ImageFiles, row: int) -> str:
    """Write the label file of an image."""
    index, rows = files.index, files.index.slice(row)
    kept = ~(index.crowd[rows] | index.difficult[rows])
    quads = shares(index.boxes[rows][kept], index.sizes[row])
    labels = index.labels[rows][kept]
    return "".join(
        f"{label} {' '.join(map(_number, quad))}\n" for label, quad in zip(labels.tolist(), quads.tolist(), strict=True)
    )


def _number(value: float) -> str:
    text = f"{value:.{DIGITS}f}".rstrip("0")
    return text + "0" if text.endswith(".") else text
