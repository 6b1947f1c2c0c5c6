"""Sets with everything in them that formats differ in."""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest

from paceline.data.convert.conversion import ConvertConfig, convert
from paceline.data.whole_set import open_whole_set

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.index import Index
    from paceline.data.whole_set import WholeSet

NAMES = ("traffic light", "Größe: 3", "no", "猫 #1", "<a> & 'b'", "unused")


@pytest.fixture
def to(tmp_path: Path) -> Callable[..., WholeSet]:
    """Return a function that converts a set to a format, at a new place, and opens the result."""
    made: list[Path] = []

    def run(data: WholeSet | str | Path, format: Any, **options: bool) -> WholeSet:  # noqa: A002
        whole = data if hasattr(data, "splits") else open_whole_set(str(data))
        out = tmp_path / f"out{len(made)}"
        made.append(out)
        if format == "pack":
            out = out.with_suffix(".pack")
        convert(whole, out, ConvertConfig(format=format, **options))  # type: ignore[arg-type]
        assert [path for path in tmp_path.iterdir() if path.name.startswith(".out")] == []
        return open_whole_set(str(out))

    return run


@pytest.fixture
def yolo_set(tmp_path: Path) -> Path:
    """Three splits, nested folders with equal names, an empty image, one that is turned, boxes with many digits."""
    random = np.random.default_rng(0)
    root = tmp_path / "yolo"
    for split, names in {
        "train": ["a/1.png", "b/1.png", "b/c/1.jpg", "ü ö.jpg", "2.jpg"],
        "val": ["a/1.png", "3.jpg"],
        "test": ["4.jpg"],
    }.items():
        for number, name in enumerate(names):
            image = root / "images" / split / name
            image.parent.mkdir(parents=True, exist_ok=True)
            height, width = random.integers(50, 400, 2).tolist()
            encoded, content = cv2.imencode(image.suffix, random.integers(0, 256, (height, width, 3), np.uint8))
            assert encoded
            image.write_bytes(turned(content.tobytes(), 6) if name == "2.jpg" else content.tobytes())
            label = root / "labels" / split / name
            label.parent.mkdir(parents=True, exist_ok=True)
            lines = []
            for _ in range(0 if name == "b/1.png" else number + 1):
                sides = random.uniform(0.05, 0.5, 2)
                quad = [*random.uniform(sides / 2, 1 - sides / 2), *sides]
                digits = int(random.integers(3, 15))
                lines.append(f"{random.integers(5)} {' '.join(f'{value:.{digits}f}' for value in quad)}\n")
            label.with_suffix(".txt").write_text("".join(lines))
    lines = [f"{split}: images/{split}" for split in ("train", "val", "test")]
    (root / "data.yaml").write_text("\n".join(lines) + f"\nnames: {json.dumps(NAMES)}\n", encoding="utf-8")
    return root


def turned(content: bytes, orientation: int) -> bytes:
    """A JPEG with an EXIF orientation."""
    body = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + bytes(4)
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


@pytest.fixture
def coco_set(tmp_path: Path) -> Path:
    """Crowds, areas, ids with gaps and out of order, outlines, and boxes that do not add up in binary."""
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    random = np.random.default_rng(1)
    for split, ids in {"train": [139, 7, 99999], "val": [12]}.items():
        (root / split).mkdir()
        images, annotations = [], []
        for number in ids:
            cv2.imwrite(str(root / split / f"{number:012d}.jpg"), random.integers(0, 256, (90, 120, 3), np.uint8))
            images.append({"id": number, "file_name": f"{number:012d}.jpg", "height": 90, "width": 120})
            for row in range(0 if number == 7 else 4):
                x, y = random.uniform(0, 50, 2).round(2).tolist()
                width, height = random.uniform(5, 39, 2).round(2).tolist()
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": [3, 18, 90][row % 3],
                        "bbox": [x, y, width, height],
                        "area": round(width * height * 0.7, 3),
                        "iscrowd": int(row == 3),
                        "segmentation": [[x, y, x + width, y, x + width / 2, y + height]],
                    }
                )
        categories = [{"id": number, "name": name} for number, name in zip((3, 18, 90), NAMES, strict=False)]
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root


@pytest.fixture
def voc_set(make_voc: Callable[..., Path], voc_object: Callable[..., str]) -> Path:
    """Difficult objects, and an image in two splits."""
    boxes = [(1.25, 2, 30.1, 20.7), (10, 11, 59, 39.9), (0, 0, 60, 40)]
    objects = {
        "a": voc_object("cat", boxes[0]) + voc_object("dog", boxes[1], 1),
        "b": "",
        "c": voc_object("dog", boxes[2]),
        "d": voc_object("dog", boxes[0], 1) + voc_object("cat", boxes[1]),
    }
    return make_voc(objects, {"train": ["a", "b", "c"], "val": ["d", "a"]})


def same(first: Index, second: Index, *, columns: tuple[str, ...], atol: float = 0.0, by_name: bool = False) -> None:
    """Compare two indexes image by image: columns to the bit, boxes within `atol` px; images in order, or by name."""
    assert first.names == second.names
    assert len(first) == len(second)
    order = np.arange(len(second))
    if by_name:
        keys = [[str(index.path(row)).rsplit("/", 1)[1] for row in range(len(index))] for index in (first, second)]
        order = np.array([keys[1].index(key) for key in keys[0]])
    second = second.select_images(order)
    assert np.array_equal(first.offsets, second.offsets)
    assert np.abs(first.boxes - second.boxes).max(initial=0) <= atol
    for column in columns:
        assert np.array_equal(getattr(first, column), getattr(second, column)), column
