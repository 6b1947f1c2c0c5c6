"""Small data sets of all three formats, written into temporary folders."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest

from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from paceline.data.dataset import DataSet

GOOD_LINE = "0 0.5 0.5 0.25 0.5\n"


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """Return a function that writes an image of one colour; its file ends as its path does."""

    def write(path: Path, height: int = 40, width: int = 60, value: int = 127) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        encoded, content = cv2.imencode(path.suffix.lower(), np.full((height, width, 3), value, np.uint8))
        assert encoded
        path.write_bytes(content.tobytes())
        return path

    return write


@pytest.fixture
def make_yolo(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a set of `images/<split>/NN.jpg` of 60 x 40 px with one label file each.

    It takes, per split, the content of the label files: text, bytes, or None for no file; and more lines for the yaml.
    """

    def make(
        splits: Mapping[str, Sequence[str | bytes | None]], yaml: str = "names: [cat, dog]\n", folder: str = "set"
    ) -> Path:
        root = tmp_path / folder
        for split, contents in splits.items():
            (root / "labels" / split).mkdir(parents=True)
            for number, content in enumerate(contents):
                write_image(root / "images" / split / f"{number:02d}.jpg", value=(number * 7 + len(split)) % 256)
                if content is not None:
                    raw = content if isinstance(content, bytes) else content.encode()
                    (root / "labels" / split / f"{number:02d}.txt").write_bytes(raw)
        lines = "".join(f"{split}: images/{split}\n" for split in splits)
        (root / "data.yaml").write_text(lines + yaml, encoding="utf-8")
        return root

    return make


@pytest.fixture
def make_coco(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes one `instances.json` and 60 x 40 px images; it takes the annotations."""

    def make(annotations: Sequence[dict[str, object]], /, num_images: int = 4, **changes: object) -> Path:
        root = tmp_path / "coco"
        images = [{"id": 10 + k, "file_name": f"{k}.jpg", "height": 40, "width": 60} for k in range(num_images)]
        for entry in images:
            write_image(root / "images" / str(entry["file_name"]))
        categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
        document = {"images": images, "categories": categories, "annotations": list(annotations)} | changes
        text = json.dumps({key: value for key, value in document.items() if value is not None})
        (root / "instances.json").write_text(text)
        return root

    return make


@pytest.fixture
def make_voc(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    """Return a function that writes a VOC folder; it takes, per image name, the objects as XML, and the lists."""

    def make(objects: Mapping[str, str], lists: Mapping[str, Sequence[str]] | None = None) -> Path:
        root = tmp_path / "voc"
        (root / "Annotations").mkdir(parents=True)
        for name, content in objects.items():
            write_image(root / "JPEGImages" / f"{name}.jpg")
            size = "<size><width>60</width><height>40</height></size>"
            (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{content}</annotation>")
        for split, names in (lists or {}).items():
            (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names))
        return root

    return make


@pytest.fixture
def voc_object() -> Callable[..., str]:
    """Return a function that writes an object of a VOC annotation."""

    def write(name: str, box: Sequence[object] = (10, 10, 30, 20), difficult: int = 0) -> str:
        keys = ("xmin", "ymin", "xmax", "ymax")
        corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, box, strict=True))
        return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"

    return write


@pytest.fixture
def open_set() -> Callable[..., DataSet]:
    """Return a function that opens a data set by its path."""

    def open_it(
        data: Path | str, *, seed: int = 0, splits: tuple[str, ...] = ("train", "val"), **changes: object
    ) -> DataSet:
        return open_data_set(DataConfig(data=str(data), **changes), seed=seed, splits=splits)  # type: ignore[arg-type]

    return open_it
