"""Conversion there and back: what every format can hold comes back, to the last digit that it has."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.convert.coco import widths
from paceline.data.convert.yolo import ring_of, shares
from paceline.data.formats.yolo import YoloLabels
from paceline.data.pack.store import store_of
from paceline.data.polygons import Polygons
from paceline.data.whole_set import open_whole_set

from .conftest import NAMES, same

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.index import Index
    from paceline.data.whole_set import WholeSet

COMMON = ("sizes", "orientation", "labels", "crowd", "difficult")
YOLO_PX = 1e-11
"""14 digits behind the point, of sides up to 400 px."""


def _digests(index: Index) -> list[str]:
    store = store_of(index)
    return [hashlib.md5(store.read(row)).hexdigest() for row in range(len(index))]


def _by_content(index: Index) -> Index:
    """The images in the order of their contents, which no conversion changes."""
    return index.select_images(np.argsort(_digests(index)))


@pytest.mark.parametrize("route", list(itertools.permutations(("coco", "voc", "pack"))), ids="-".join)
def test_the_whole_round_gives_the_same_label_files(
    yolo_set: Path, to: Callable[..., WholeSet], route: tuple[str, ...]
) -> None:
    start = open_whole_set(str(yolo_set))
    found = start
    for kind in route:
        found = to(found, kind)
        assert found.names == NAMES
        assert tuple(found.splits) == ("train", "val", "test")
        for split, index in found.splits.items():
            first, second = _by_content(start.splits[split]), _by_content(index)
            same(first, second, columns=(*COMMON, "area"))
    end = to(found, "yolo")
    for split, index in end.splits.items():
        same(_by_content(start.splits[split]), _by_content(index), columns=COMMON, atol=YOLO_PX)
        assert sorted(_digests(index)) == sorted(_digests(start.splits[split])), "images are never encoded anew"
        for name in start.splits[split].paths:
            label = name.replace("images/", "labels/").rsplit(".", 1)[0] + ".txt"
            texts = [
                [[float(word) for word in line.split()] for line in (root / label).read_text().splitlines()]
                for root in (yolo_set, end.source.parent)  # type: ignore[union-attr]
            ]
            assert texts[0] == texts[1], "numbers with up to 14 digits are written with the same digits again"


def test_nested_folders_keep_their_names(yolo_set: Path, to: Callable[..., WholeSet]) -> None:
    start = open_whole_set(str(yolo_set))
    for kind in ("yolo", "pack", "coco", "voc"):
        for split, index in to(start, kind).splits.items():
            expected = {name.split(f"images/{split}/")[1] for name in start.splits[split].paths}
            assert {name.split(f"{split}/", 1)[1] for name in index.paths} == expected


@pytest.mark.parametrize("route", [("pack",), ("coco",), ("pack", "coco"), ("coco", "pack", "coco")], ids="-".join)
def test_coco_keeps_everything_in_coco_and_packs(
    coco_set: Path, to: Callable[..., WholeSet], route: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    start = open_whole_set(str(coco_set))
    found = start
    for kind in route:
        found = to(found, kind, strict=True)
    assert caplog.messages == []
    for split, index in found.splits.items():
        same(start.splits[split], index, columns=(*COMMON, "area", "image_ids", "category_ids"))
        _same_outlines(start.splits[split], index)


def _same_outlines(first: Index, second: Index) -> None:
    for name in ("points", "rings", "boxes"):
        assert np.array_equal(getattr(first.polygons, name), getattr(second.polygons, name))


@pytest.mark.parametrize("route", [("voc",), ("pack",), ("coco",), ("coco", "voc"), ("pack", "coco", "pack", "voc")])
def test_difficult_objects_come_back(voc_set: Path, to: Callable[..., WholeSet], route: tuple[str, ...]) -> None:
    start = open_whole_set(str(voc_set))
    found = start
    for kind in route:
        found = to(found, kind, strict=kind != "voc")
    for split, index in found.splits.items():
        same(start.splits[split], index, columns=(*COMMON, "area"), by_name=True)
    assert sum(index.difficult.sum() for index in found.splits.values()) == 3


def test_other_readers_of_our_coco_files_leave_difficult_boxes_out(voc_set: Path, to: Callable[..., WholeSet]) -> None:
    found = to(voc_set, "coco")
    document = json.loads((found.source / "annotations/instances_train.json").read_text())  # type: ignore[operator]
    flags = [(entry["iscrowd"], entry.get("difficult", 0)) for entry in document["annotations"]]
    assert flags.count((1, 1)) == 1
    assert flags.count((0, 0)) == 2


def test_an_undivided_set_stays_undivided(make_yolo: Callable[..., Path], to: Callable[..., WholeSet]) -> None:
    found = open_whole_set(str(make_yolo({"train": ["0 0.5 0.5 0.25 0.5\n"] * 3})))
    for kind in ("voc", "coco", "pack", "yolo"):
        found = to(found, kind)
        assert tuple(found.splits) == ("train",)


def test_coco33_from_coco_to_pack_and_back(shared: Path, to: Callable[..., WholeSet]) -> None:
    start = open_whole_set(str(shared / "data/coco33"))
    found = to(to(start, "pack", strict=True), "coco", strict=True)
    for split, index in found.splits.items():
        same(start.splits[split], index, columns=(*COMMON, "area", "image_ids", "category_ids"))
        _same_outlines(start.splits[split], index)


_sides = st.floats(1e-3, 5000, allow_nan=False)


@settings(max_examples=300, deadline=None)
@given(st.floats(0, 5000), _sides)
def test_coco_sides_give_the_same_corner_to_the_last_bit(low: float, side: float) -> None:
    high = low + side
    found = widths(np.array([low]), np.array([high]))
    assert low + float(found[0]) == high


@settings(max_examples=300, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.integers(1, 20_000), st.integers(1, 20_000))
def test_yolo_shares_are_the_corners_within_the_digits(quad: list[float], height: int, width: int) -> None:
    low, high = np.sort(np.array(quad).reshape(2, 2), axis=0)
    boxes = np.concatenate([low, high])[None] * [width, height, width, height]
    size = np.array([height, width], np.int32)
    written = np.array([[float(f"{value:.14f}") for value in shares(boxes, size)[0]]])
    placed, _ = YoloLabels().place(written, size[None])
    assert np.abs(placed - boxes).max() <= 2e-14 * max(height, width)


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 9), st.integers(0, 2**32 - 1))
def test_a_ring_has_the_bounds_of_its_box(number: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    points = random.uniform(0, 700, (number, 2))
    box = np.concatenate([points.min(axis=0), points.max(axis=0)])

    class Small:
        boxes = box[None]
        polygons = Polygons.of([[points]])

    ring = ring_of(Small, 0)  # type: ignore[arg-type]
    assert ring is not None
    assert np.array_equal(np.concatenate([ring.min(axis=0), ring.max(axis=0)]), box), "float64, though points are not"
    assert np.array_equal(ring.astype(np.float32), points.astype(np.float32))
    Small.boxes = box[None] + [0, 0, 1, 0]
    assert ring_of(Small, 0) is None  # type: ignore[arg-type]
    Small.polygons = Polygons.of([[points, points]])
    assert ring_of(Small, 0) is None  # type: ignore[arg-type]


def test_outlines_are_written_where_the_format_has_them(
    coco_set: Path, to: Callable[..., WholeSet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    start = open_whole_set(str(coco_set))
    random = np.random.default_rng(0)
    splits = {}
    for split, index in start.splits.items():
        outlines = []
        for row, (x1, y1, x2, y2) in enumerate(index.boxes.tolist()):
            ring = random.uniform((x1, y1), (x2, y2), (6, 2))
            ring[:2] = (x1, y1), (x2, y2)
            outlines.append([[ring], [ring, ring + 1], [ring + 0.5]][row % 3])
        splits[split] = dataclasses.replace(index, polygons=Polygons.of(outlines))
    data = dataclasses.replace(start, splits=splits)
    packed = to(data, "pack").splits["train"]
    _same_outlines(splits["train"], packed)
    coco = to(data, "coco").source
    document = json.loads((coco / "annotations/instances_train.json").read_text())  # type: ignore[operator]
    for row, entry in enumerate(document["annotations"]):
        written = [np.array(ring, np.float32).reshape(-1, 2) for ring in entry["segmentation"]]
        expected = splits["train"].polygons.outline(row)
        assert len(written) == len(expected)
        assert all(np.array_equal(first, second) for first, second in zip(written, expected, strict=True))
    found = to(data, "yolo")
    kept = sum(int((np.flatnonzero(index.targets) % 3 == 0).sum()) for index in splits.values())
    total = sum(int(index.targets.sum()) for index in splits.values())
    assert any(f"{total - kept} outlines (their boxes are kept)" in message for message in caplog.messages)
    lines = [
        line.split() for path in found.source.parent.glob("labels/*/*.txt") for line in path.read_text().splitlines()
    ]
    assert sorted(len(line) for line in lines) == [5] * (total - kept) + [13] * kept
    for split, index in found.splits.items():
        targets = splits[split].select_boxes(splits[split].targets)
        same(targets, index, columns=("labels",), atol=YOLO_PX, by_name=True)
    to(data, "voc")
    assert any(f"{total} outlines (their boxes are kept)" in message for message in caplog.messages)
