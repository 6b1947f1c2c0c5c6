"""A check names every fault, counts right, and tells whether a training would start."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.check import check_data, summarise
from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.index import Index, Strings
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

GOOD = "0 0.5 0.5 0.25 0.5\n"
DOG = "1 0.5 0.5 0.2 0.2\n"


def _config(data: Path) -> DataConfig:
    return DataConfig(data=str(data))


def test_summary_counts(make_yolo: Callable[..., Path]) -> None:
    report = check_data(_config(make_yolo({"train": [GOOD + DOG, GOOD, None], "val": [DOG]})))
    train, val = report.splits
    assert report.usable
    assert (train.num_boxes, train.num_without_boxes, train.most_boxes) == (3, 1, 2)
    assert (train.class_boxes, train.class_images) == ((2, 1), (2, 1))
    assert (val.class_boxes, val.class_images) == ((0, 1), (0, 1))
    assert train.image_sizes == ((40, 60, 3),)
    assert train.area_shares == (1, 0, 0)
    assert train.box_sizes_px[2] == pytest.approx((15 * 20) ** 0.5)
    text = report.format_text()
    assert "train: 3 images (1 without boxes), 3 boxes; at most 2 in one image" in text
    assert "Nothing is wrong" in text
    assert any(line.split() == ["1", "dog", "1", "1"] for line in text.splitlines())


@pytest.mark.parametrize("names", ["[cat, dog, cat]", "{0: cat, 1: dog, 2: cat}"])
def test_classes_of_one_name_are_warned_of(
    make_yolo: Callable[..., Path], caplog: pytest.LogCaptureFixture, names: str
) -> None:
    """The set is used, since each is a class of its own."""
    root = make_yolo({"train": [GOOD + DOG, "2 0.5 0.5 0.25 0.5\n"], "val": [GOOD]}, yaml=f"names: {names}\n")
    report = check_data(_config(root))
    assert report.usable
    assert report.report.counts == {"name": 1}
    assert "classes 0 and 2 have one name, cat; give each its own name" in report.format_text()
    opened = open_data_set(_config(root), seed=0)
    assert opened.names == ("cat", "dog", "cat")
    (warning,) = [entry.message for entry in caplog.records if entry.levelname == "WARNING"]
    assert "classes 0 and 2 have one name" in warning


def test_faults_are_listed_file_by_file(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 20 + [GOOD + "0 0.5 nan 0.1 0.1\n"], "val": [GOOD]})
    (root / "images/train/03.jpg").write_bytes(b"<html></html>")
    report = check_data(_config(root))
    text = report.format_text()
    assert report.usable
    assert "images/train/03.jpg: is a web page" in text
    assert "labels/train/20.txt:2: the box has a NaN" in text
    assert "No training can start" not in text


def test_what_stops_a_training_is_said_not_raised(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 4, "val": [None]})
    with (root / "data.yaml").open("a") as stream:
        stream.write("test: images/test\n")
    (root / "images/train/03.jpg").write_bytes(b"")
    report = check_data(_config(root))
    assert not report.usable
    assert len(report.errors) == 2
    assert "1 of 4 images cannot be used" in report.errors[0]
    assert "none of its 1 images has a label" in report.errors[1]
    assert "No training can start" in report.format_text()
    assert len(report.test_errors) == 1
    assert "images/test" in report.test_errors[0]


def test_nothing_is_called_well_where_no_training_can_start(make_yolo: Callable[..., Path]) -> None:
    text = check_data(_config(make_yolo({"train": [GOOD] * 4, "val": [""]}))).format_text()
    assert "No training can start:\n" in text
    assert "Nothing is wrong" not in text


@pytest.mark.parametrize(
    ("splits", "lines", "usable"),
    [
        ({"train": [GOOD] * 3, "val": [GOOD]}, "", True),
        ({"train": [GOOD] * 3, "val": [GOOD]}, "test: images/test\n", True),  # as exports write it, without the folder
        ({"train": [GOOD] * 3, "val": [GOOD], "test": [None]}, "", True),
        ({"train": [GOOD] * 3, "val": [GOOD], "test": ["7 1 1 1 1\n"]}, "", True),
        ({"train": [GOOD] * 3}, "", True),
        ({"train": [GOOD] * 2}, "", True),
        ({"train": [GOOD]}, "", False),
        ({"train": [GOOD, None, ""]}, "", False),
        ({"train": [None] * 3}, "", False),
        ({"train": [GOOD], "val": [GOOD]}, "", True),
        ({"train": [GOOD], "val": [None]}, "", False),
        ({"train": [GOOD] * 3}, "val: images/val\n", False),
        ({"val": [GOOD] * 3}, "", False),
        ({"test": [GOOD] * 3}, "", False),
        ({"val": [GOOD] * 3, "test": [GOOD]}, "", False),
    ],
)
def test_the_verdict_is_that_of_a_training(
    make_yolo: Callable[..., Path], splits: dict[str, list[str | None]], lines: str, usable: bool
) -> None:
    root = make_yolo(splits, yaml=f"{lines}names: [cat, dog]\n")
    report = check_data(_config(root))
    assert report.usable == usable
    if usable:
        open_data_set(_config(root), seed=0)
    else:
        with pytest.raises(UserError) as caught:
            open_data_set(_config(root), seed=0)
        assert str(caught.value).split(":\n", 1)[0] in report.errors
    assert ("No training can start" in report.format_text()) != usable
    tested = "test" in splits or "test" in lines
    assert ("test cannot be evaluated" in report.format_text()) == (tested and GOOD not in splits.get("test", []))
    assert ("held back" in report.format_text()) == ("train" in splits and "val" not in splits and not lines)


def test_images_in_two_splits_are_found(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD] * 3})
    shutil.copy(root / "images/train/01.jpg", root / "images/val/twin.jpg")
    report = check_data(_config(root))
    assert report.repeated == (("train: 01.jpg", "val: twin.jpg"),)
    assert "1 images are in two splits" in report.format_text()


def test_missing_val_is_mentioned(make_yolo: Callable[..., Path]) -> None:
    assert "10% of the train images" in check_data(_config(make_yolo({"train": [GOOD] * 3}))).format_text()


def test_nothing_to_open_raises(make_yolo: Callable[..., Path], tmp_path: Path) -> None:
    root = make_yolo({"train": []})
    with pytest.raises(UserError, match="does not exist"):
        check_data(_config(root))
    with pytest.raises(UserError, match="does not exist"):
        check_data(_config(tmp_path / "none"))


def test_bccd(shared: Path) -> None:
    report = check_data(_config(shared / "data" / "bccd_voc"))
    assert [sum(split.class_boxes) for split in report.splits] == [2804, 1137, 945]
    assert report.report.counts == {"degenerate": 2}
    assert not report.repeated


def test_images_that_differ_behind_their_middle_are_not_the_same(
    make_yolo: Callable[..., Path], write_image: Callable[..., Path]
) -> None:
    root = make_yolo({"train": [GOOD], "val": [GOOD]})
    content = write_image(root / "images/train/twin.jpg", 400, 600).read_bytes() + bytes(100_000)
    (root / "images/train/twin.jpg").write_bytes(content)
    (root / "images/val/twin.jpg").write_bytes(content[:-1] + b"x")
    assert not check_data(_config(root)).repeated
    (root / "images/val/twin.jpg").write_bytes(content)
    assert check_data(_config(root)).repeated == (("train: twin.jpg", "val: twin.jpg"),)


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=12))
def test_image_sizes_are_counted_as_one_by_one(sizes: list[tuple[int, int]]) -> None:
    none = np.zeros(0)
    index = Index(
        names=("cat",),
        root=Path(),
        paths=Strings.of("x" for _ in sizes),
        sizes=np.array(sizes, np.int32),
        orientation=np.ones(len(sizes), np.uint8),
        offsets=np.zeros(len(sizes) + 1, np.int64),
        boxes=np.zeros((0, 4)),
        labels=none.astype(np.int32),
        crowd=none.astype(np.bool_),
        difficult=none.astype(np.bool_),
        area=none,
        image_ids=np.arange(len(sizes)),
        category_ids=np.zeros(1, np.int64),
        origins=np.arange(len(sizes)),
    )
    expected = tuple((*size, number) for size, number in Counter(sizes).most_common())
    assert summarise("train", index).image_sizes == expected
