"""Labels without an image, images without labels, images that nothing lists: all formats say so in the same manner."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from paceline.data.check import MOST_HINTS, check_data
from paceline.data.config import DataConfig
from paceline.data.findings import MOST_PER_KIND, FindingCollector

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.check import CheckReport
    from paceline.data.dataset import DataSet

GOOD = "0 0.5 0.5 0.25 0.5\n"
BARE = "images without labels (used as background): {}"
UNLISTED = "images that nothing lists (not used): {}"


def _check(data: Path) -> CheckReport:
    return check_data(DataConfig(data=str(data)))


def _found(report: CheckReport, kind: str) -> list[str]:
    return [finding.file for finding in report.report.findings if finding.kind == kind]


def test_yolo(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD, None, ""], "val": [GOOD, None]})
    (root / "labels/train/lost.txt").write_text(GOOD)
    report = _check(root)
    assert report.usable
    assert report.report.counts == {"unpaired": 1, "unlabelled": 2}
    assert _found(report, "unlabelled") == ["images/train/01.jpg", "images/val/01.jpg"]
    assert BARE.format(2) in report.format_text()


def test_voc(make_voc: Callable[..., Path], voc_object: Callable[..., str], write_image: Callable[..., Path]) -> None:
    """Once for the whole set, however many splits it has; a list of images decides which are used."""
    names = ["a", "b", "c", "d"]
    root = make_voc(dict.fromkeys(names, voc_object("cat")), {"train": ["a", "b", "bare"], "val": ["c"], "test": ["d"]})
    for name in ("bare", "idle", "deep/idle"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
    for name in ("lost", "deep/lost", "deep/other", "far/lost"):
        (root / "Annotations" / name).parent.mkdir(exist_ok=True)
        (root / "Annotations" / f"{name}.xml").write_text((root / "Annotations/a.xml").read_text())
    (root / "JPEGImages/deep/other.gif").touch()
    report = _check(root)
    assert report.usable
    assert report.report.counts == {"unpaired": 4, "unlabelled": 1, "unlisted": 2}
    assert _found(report, "unlabelled") == ["JPEGImages/bare.jpg"]
    assert _found(report, "unlisted") == ["JPEGImages/deep/idle.jpg", "JPEGImages/idle.jpg"]
    text = report.format_text()
    assert "Annotations/deep/other.xml: its image other.gif is of a type that is not read" in text
    assert "Annotations/lost.xml: no image has its name" in text
    assert "is in none of ImageSets/Main/train.txt, ImageSets/Main/val.txt, ImageSets/Main/test.txt" in text
    assert BARE.format(1) in text
    assert UNLISTED.format(2) in text


def test_undivided_voc_uses_all_of_its_images(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], write_image: Callable[..., Path]
) -> None:
    root = make_voc(dict.fromkeys("abc", voc_object("cat")))
    write_image(root / "JPEGImages/bare.jpg")
    assert _check(root).report.counts == {"unlabelled": 1}


def _coco(root: Path, write_image: Callable[..., Path], files: dict[str, list[str]]) -> Path:
    """Write a set of splits whose images are `files`, the first of each with a box, and a yaml that names them."""
    lines = []
    for split, names in files.items():
        images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
        notes = [{"id": 1, "image_id": 0, "category_id": 1, "bbox": [1, 1, 5, 5]}]
        document = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "cat"}]}
        root.mkdir(exist_ok=True)
        (root / f"{split}.json").write_text(json.dumps(document))
        lines.append(f"{split}: {{annotations: {split}.json, images: photos}}\n")
        for name in names:
            write_image(root / "photos" / name)
    (root / "data.yaml").write_text("".join(lines))
    return root / "data.yaml"


@pytest.mark.parametrize("second", ["photos", "photos/inner", "other"])
def test_coco(tmp_path: Path, write_image: Callable[..., Path], second: str) -> None:
    """An image is unlisted where no split lists it, and is named once, whether splits share a folder or not."""
    data = _coco(tmp_path / "set", write_image, {"train": ["a.jpg", "b.jpg"], "val": ["c.jpg", "inner/d.jpg"]})
    for name in ("photos/idle.jpg", "photos/inner/idle.jpg", "other/idle.jpg", "other/photos/c.jpg"):
        write_image(tmp_path / "set" / name)
    data.write_text(data.read_text().replace("val.json, images: photos", f"val.json, images: {second}"))
    if second == "photos/inner":
        write_image(tmp_path / "set/photos/inner/c.jpg")
    if second == "other":
        for name in ("c.jpg", "inner/d.jpg"):
            write_image(tmp_path / "set/other" / name)
            (tmp_path / "set/photos" / name).unlink()
    report = _check(data)
    assert report.usable
    bare = {"photos": "photos/inner/d.jpg", "photos/inner": "photos/inner/d.jpg", "other": "other/inner/d.jpg"}[second]
    if second == "photos/inner":  # "inner/d.jpg" is found beside the folder
        assert (tmp_path / "set/photos/c.jpg").is_file()  # so is "c.jpg", though there is one inside
    others = ["other/idle.jpg", "other/photos/c.jpg"] if second == "other" else []
    assert _found(report, "unlisted") == ["photos/idle.jpg", "photos/inner/idle.jpg", *others]
    assert _found(report, "unlabelled") == ["photos/b.jpg", bare]
    assert UNLISTED.format(len(_found(report, "unlisted"))) in report.format_text()


def test_a_list_of_many_is_short(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture
) -> None:
    """Background is legitimate: it is counted in a line, a few are named, and nothing is called wrong."""
    root = make_yolo({"train": [GOOD] + [None] * (MOST_HINTS + 5), "val": [GOOD]})
    text = _check(root).format_text()
    assert "Nothing is wrong with its files." in text
    assert BARE.format(MOST_HINTS + 5) in text
    assert text.count("has no label file") == MOST_HINTS
    assert "... and 5 more" in text
    with caplog.at_level("INFO", "paceline"):
        opened = open_set(root)
    assert opened.report.num_bad_files == 0
    assert [record.levelname for record in caplog.records if "without labels" in record.getMessage()] == ["INFO"]


def test_many_files_are_counted_beyond_those_that_are_kept() -> None:
    collector = FindingCollector()
    for number in (3, MOST_PER_KIND, 7):
        collector.add_files("unlabelled", [f"{k}.jpg" for k in range(number)], "is bare")
    assert collector.counts == {"unlabelled": MOST_PER_KIND + 10}
    assert [finding.file for finding in collector.findings[:4]] == ["0.jpg", "1.jpg", "2.jpg", "0.jpg"]
    assert len(collector.findings) == MOST_PER_KIND


def test_label_that_comes_later_is_seen(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD, None], "val": [GOOD]})
    for _ in range(2):
        assert open_set(root).report.counts == {"unlabelled": 1}
    (root / "labels/train/01.txt").write_text("")
    assert open_set(root).report.counts == {}
