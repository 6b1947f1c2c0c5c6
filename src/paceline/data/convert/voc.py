"""Pascal VOC writer: `JPEGImages/`, `Annotations/`, `ImageSets/Main/<split>.txt` and `classes.txt`.

Corners are written with as many digits as it takes to read the same ones again, to the last bit. An image that is in
two splits with the same boxes is there once.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from paceline.data.convert.naming import Places

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from paceline.data.convert.images import ImageFiles


def write_voc(
    folder: Path, splits: Mapping[str, ImageFiles], each: Callable[[int, Callable[[int], None]], None]
) -> None:
    """Write a data set; `each(number, work)` calls `work` for all rows of a split, in any order."""
    for name in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    places = Places(name for files in splits.values() for name in files.index.paths)
    known: dict[tuple[str, str], str] = {}
    for split, files in splits.items():
        stems: list[str] = []
        work: list[tuple[int, str, str]] = []
        for row, name in enumerate(files.index.paths):
            key = (files.key(row), _objects(files, row))
            if key not in known:
                place = places.take(name, files.suffix(row))
                known[key] = os.path.splitext(place)[0]
                work.append((row, place, key[1]))
            stems.append(known[key])

        def write(number: int, files: ImageFiles = files, work: list[tuple[int, str, str]] = work) -> None:
            row, place, objects = work[number]
            files.write(row, folder / "JPEGImages" / place)
            annotation = folder / "Annotations" / f"{os.path.splitext(place)[0]}.xml"
            annotation.parent.mkdir(parents=True, exist_ok=True)
            annotation.write_text(_annotation(files, row, place, objects), encoding="utf-8")

        each(len(work), write)
        if tuple(splits) != ("train",):  # a set of train alone stays undivided
            lines = "".join(f"{stem}\n" for stem in stems)
            (folder / "ImageSets" / "Main" / f"{split}.txt").write_text(lines, encoding="utf-8")
    names = next(iter(splits.values())).index.names
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def _annotation(files: ImageFiles, row: int, place: str, objects: str) -> str:
    height, width = files.index.sizes[row].tolist()
    return (
        f"<annotation>\n<filename>{escape(place)}</filename>\n"
        f"<size><width>{width}</width><height>{height}</height></size>\n{objects}</annotation>\n"
    )


def _objects(files: ImageFiles, row: int) -> str:
    """Write the objects of an image; crowd regions are left out."""
    index, rows = files.index, files.index.slice(row)
    lines = []
    for box, label, crowd, difficult in zip(
        index.boxes[rows].tolist(),
        index.labels[rows].tolist(),
        index.crowd[rows].tolist(),
        index.difficult[rows].tolist(),
        strict=True,
    ):
        if not crowd:
            keys = ("xmin", "ymin", "xmax", "ymax")
            corners = "".join(f"<{key}>{value!r}</{key}>" for key, value in zip(keys, box, strict=True))
            name = escape(index.names[label])
            flag = int(difficult)
            lines.append(
                f"<object><name>{name}</name><difficult>{flag}</difficult><bndbox>{corners}</bndbox></object>\n"
            )
    return "".join(lines)
