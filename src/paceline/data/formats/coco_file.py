"""COCO file: one JSON of images, categories and annotations, condensed to arrays as soon as it is read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.findings import printable
from paceline.data.polygons import Polygons
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from numpy.typing import NDArray

FARTHEST_PX = 1 << 20
"""Points farther out belong to no image: OpenCV, which draws outlines too, decodes none that is longer."""
_MOST = 1 << 62
"""Whole numbers from here on are none of this format."""
NO_ID = -_MOST
"""In the place of an id that an annotation does not have."""
_DOWN = frozenset({"", "0", "false", "no"})
"""Flags that are not set, where they are written as text."""
_LONGEST = 100
"""Digits of a number that is given as text; Python itself refuses some thousands."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CocoFile:
    """N images and M annotations as a file has them."""

    path: Path
    categories: dict[int, str]
    """Category id -> name."""
    file_names: tuple[str, ...]
    image_ids: NDArray[np.int64]
    """N."""
    sizes: NDArray[np.int64]
    """N2, (height, width) as the file says; 0 where it does not."""
    image_of: NDArray[np.int64]
    """M, image id of each annotation; NO_ID where it has none."""
    category_of: NDArray[np.int64]
    """M, category id; NO_ID where it has none."""
    boxes: NDArray[np.float64]
    """M4, xyxy px."""
    formed: NDArray[np.bool_]
    """M, False where there is no box of four numbers."""
    crowd: NDArray[np.bool_]
    difficult: NDArray[np.bool_]
    """M, True where the annotation carries `"difficult": 1`, as our own writer has it; these are no crowd."""
    area: NDArray[np.float64]
    """M, NaN where the annotation gives none, or a negative one."""
    polygons: Polygons
    """Outlines of the boxes, px; those of crowds, and others that are run lengths, are left out."""

    @classmethod
    def read(cls, path: Path) -> CocoFile:
        """Read a file; raises UserError for what is no annotation file of this format, or gives an id to two things."""
        document = _parse(path)
        images = _list_of(document, "images", path, '{"id": 1, "file_name": "a.jpg"}')
        categories = _list_of(document, "categories", path, '{"id": 1, "name": "cat"}')
        annotations = document.get("annotations", [])
        if not isinstance(annotations, list):
            raise UserError(f"{path}: `annotations` is not a list; export the file again.")
        try:
            category_ids = [_id(entry["id"]) for entry in categories]
            names = [printable(str(entry["name"])) for entry in categories]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: every entry of `categories` needs an `id` (a whole number below 2^62) and a `name`."
            ) from error
        try:
            file_names = tuple(str(entry["file_name"]).replace("\\", "/") for entry in images)
            image_ids = [_id(entry["id"]) for entry in images]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: every entry of `images` needs an `id` (a whole number below 2^62) and a `file_name`."
            ) from error
        by_category = _by_id(path, "category", category_ids, names)
        _by_id(path, "image", image_ids, file_names)
        entries = [entry if isinstance(entry, dict) else {} for entry in annotations]
        quads = [_quad(entry.get("bbox")) for entry in entries]
        boxes = np.array([quad or (0.0, 0.0, 0.0, 0.0) for quad in quads], np.float64).reshape(-1, 4)
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named afterwards
            boxes[:, 2:] += boxes[:, :2]
        return cls(
            path=path,
            categories=dict(sorted(by_category.items())),
            file_names=file_names,
            image_ids=np.array(image_ids, np.int64),
            sizes=np.array(
                [(_whole(entry.get("height")), _whole(entry.get("width"))) for entry in images], np.int64
            ).reshape(-1, 2),
            image_of=np.array([_whole(entry.get("image_id"), NO_ID) for entry in entries], np.int64),
            category_of=np.array([_whole(entry.get("category_id"), NO_ID) for entry in entries], np.int64),
            boxes=boxes,
            formed=np.array([quad is not None for quad in quads], np.bool_),
            crowd=np.array(
                [_is_set(entry, "iscrowd") and not _is_set(entry, "difficult") for entry in entries], np.bool_
            ),
            difficult=np.array([_is_set(entry, "difficult") for entry in entries], np.bool_),
            area=np.array([_real(entry.get("area")) for entry in entries], np.float64),
            polygons=Polygons.of(_rings(entry.get("segmentation")) for entry in entries),
        )


def _parse(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the file and its permissions.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); export or download it again.") from error
    if not isinstance(document, dict):
        raise UserError(
            f"{path} is not a COCO annotation file (an object with images, annotations and categories); name that one."
        )
    return document


def _list_of(document: dict[str, Any], key: str, path: Path, example: str) -> list[Any]:
    """Return a list that the file must have."""
    entries = document.get(key)
    if not isinstance(entries, list) or not entries:
        raise UserError(f'{path} has no `{key}`; add them as a list, such as "{key}": [{example}].')
    return entries


def _id(value: Any) -> int:
    """Read an id; raises TypeError or ValueError for what is no whole number that 64 bits hold."""
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(value)
    number = int(value)
    if abs(number) >= _MOST:
        raise ValueError(value)
    return number


def _by_id(path: Path, noun: str, ids: Iterable[int], names: Iterable[str]) -> dict[int, str]:
    """Return the name of each id; raises UserError where one is given to two names: nobody knows which boxes are whose.

    An entry that is repeated as it is does no harm.
    """
    named: dict[int, str] = {}
    for number, name in zip(ids, names, strict=True):
        first = named.setdefault(number, name)
        if first != name:
            raise UserError(printable(f"{path}: {noun} id {number} is given to {first} and {name}; give each its own."))
    return named


def _quad(box: object) -> tuple[float, float, float, float] | None:
    """Return x, y, width and height; None for anything else."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    try:
        x, y, width, height = box
        return float(x), float(y), float(width), float(height)
    except (TypeError, ValueError, OverflowError):
        return None


def _is_set(entry: dict[str, Any], key: str) -> bool:
    """Read a flag, a number or a word; it is down where it is missing."""
    value = entry.get(key)
    return value.strip().lower() not in _DOWN if isinstance(value, str) else bool(value)


def _rings(segmentation: object) -> list[NDArray[np.float64]]:
    """Return polygons of three points or more, each as x1, y1, x2, y2 ...; none where any is anything else."""
    if not isinstance(segmentation, list):
        return []
    rings = []
    for entry in segmentation:
        try:
            ring = np.array(entry, np.float64)
        except (TypeError, ValueError, OverflowError):
            return []
        if ring.ndim != 1 or len(ring) < 6 or len(ring) % 2 or not (np.abs(ring) <= FARTHEST_PX).all():
            return []
        rings.append(ring)
    return rings


def _whole(value: object, missing: int = 0) -> int:
    """Return a whole number that 64 bits hold, else `missing`."""
    if isinstance(value, str) and value.strip().removeprefix("-").isdecimal() and len(value) < _LONGEST:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and abs(value) < _MOST else missing


def _real(value: object) -> float:
    """Return a number that is not negative, else NaN."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e300 else float("nan")
