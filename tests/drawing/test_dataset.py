from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.drawing.dataset import dataset_plot
from paceline.drawing.palette import class_colour

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Read = Callable[[Path], np.ndarray]


def area(picture: np.ndarray, label: int) -> int:
    return int((picture == class_colour(label)).all(axis=2).sum())


@pytest.mark.parametrize(("num_classes", "num_boxes"), [(1, 1), (3, 100), (80, 5000), (200, 300)])
def test_sets_of_every_size(num_classes: int, num_boxes: int, tmp_path: Path, pixels: Read) -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, num_classes, num_boxes)
    boxes = np.concatenate([random.uniform(0, 1, (num_boxes, 2)), random.uniform(0, 0.5, (num_boxes, 2))], axis=1)
    sizes = random.integers(100, 900, (60, 2))
    before = boxes.copy()
    names = [f"class number {k}" for k in range(num_classes)]
    dataset_plot(tmp_path / "set.png", labels, boxes, sizes, names, title="a set")
    picture = pixels(tmp_path / "set.png")
    assert max(picture.shape) < 2500
    assert area(picture, int(np.bincount(labels).argmax())) > 50
    assert np.array_equal(boxes, before)


def test_bars_are_as_long_as_the_counts(tmp_path: Path, pixels: Read) -> None:
    labels = np.repeat([0, 1, 2], [400, 100, 200])
    dataset_plot(tmp_path / "set.png", labels, np.full((700, 4), 0.3), [(480, 640)] * 9, ["a", "b", "c"])
    picture = pixels(tmp_path / "set.png")
    assert area(picture, 0) / area(picture, 1) == pytest.approx(4, rel=0.05)
    assert area(picture, 2) / area(picture, 1) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("num_images", [0, 4])
def test_a_set_without_boxes(num_images: int, tmp_path: Path, pixels: Read) -> None:
    dataset_plot(tmp_path / "set.png", [], np.zeros((0, 4)), np.full((num_images, 2), 200), ["a", "_b", "$c$"])
    assert (pixels(tmp_path / "set.png") != 255).any()


def test_degenerate_boxes_do_not_stop_the_plot(tmp_path: Path, pixels: Read) -> None:
    dataset_plot(tmp_path / "set.png", [0, 0], [[0.5, 0.5, 0, 0.2], [0.5, 0.5, 1, 1]], [(1, 1)], ["a"])
    assert (pixels(tmp_path / "set.png") != 255).any()


def test_a_real_set(shared: Path, tmp_path: Path, pixels: Read) -> None:
    names, labels, boxes, sizes = ["RBC", "WBC", "Platelets"], [], [], []
    for path in sorted((shared / "data" / "bccd_voc" / "Annotations").glob("*.xml")):
        root = ElementTree.parse(path).getroot()
        width, height = (int(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
        sizes.append((height, width))
        for entry in root.iter("object"):
            x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{k}", "0")) for k in ("xmin", "ymin", "xmax", "ymax"))
            labels.append(names.index(entry.findtext("name", "")))
            boxes.append(((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height))
    dataset_plot(tmp_path / "set.png", labels, boxes, sizes, names)
    picture = pixels(tmp_path / "set.png")
    counts = np.bincount(labels)
    assert area(picture, 0) / area(picture, 1) == pytest.approx(counts[0] / counts[1], rel=0.08)
