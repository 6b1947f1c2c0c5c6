"""YOLO sets: what was written is what is read, in every way that a yaml may name it; bad input is named."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.formats.yolo import YoloLabels, YoloSource, label_path
from paceline.data.headers import Header
from paceline.data.scan import BadLabels
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.data.dataset import DataSet

GOOD = "0 0.5 0.5 0.25 0.5\n"
_HEADER = Header(height=40, width=60, orientation=1, format="jpeg")


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 1), st.floats(0.3, 0.7), st.floats(0.3, 0.7), st.floats(0.1, 0.5), st.floats(0.1, 0.5)
        ),
        max_size=6,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    st.booleans(),
)
def test_written_boxes_come_back(
    boxes: list[tuple[int, float, float, float, float]], end: str, encoding: str, polygons: bool
) -> None:
    def line(label: int, x: float, y: float, width: float, height: float) -> str:
        if not polygons:
            return f"{label} {x!r} {y!r} {width!r} {height!r}"
        left, top, right, bottom = x - width / 2, y - height / 2, x + width / 2, y + height / 2
        return f"{label} {left!r} {y!r} {x!r} {top!r} {right!r} {y!r} {x!r} {bottom!r}"

    content = (end.join(line(*box) for box in boxes) + end).encode(encoding)
    entries = YoloLabels().read(content, _HEADER)
    assert entries.labels == [box[0] for box in boxes]
    assert not entries.problems
    assert np.allclose(np.array(entries.quads).reshape(-1, 4), np.array([box[1:] for box in boxes]).reshape(-1, 4))
    sizes = np.tile(np.array([[40, 60]], np.int32), (len(boxes), 1))
    placed, outside = YoloLabels().place(np.array(entries.quads).reshape(-1, 4), sizes)
    assert not outside.any()
    for (_, x, y, width, height), got in zip(boxes, placed, strict=True):
        expected = [60 * (x - width / 2), 40 * (y - height / 2), 60 * (x + width / 2), 40 * (y + height / 2)]
        assert np.allclose(got, expected)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=80))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        entries = YoloLabels().read(content, _HEADER)
    except BadLabels:
        return
    assert len(entries.quads) == 4 * len(entries.labels) == 4 * len(entries.lines)


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/set/images/train/a b.JPG", "/set/labels/train/a b.txt"),
        ("/set/images/train/images/a.b.png", "/set/images/train/labels/a.b.txt"),
        ("/set/train/images/ü.png", "/set/train/labels/ü.txt"),
        ("/set/photos/a.png", "/set/photos/a.txt"),
        ("/my images/a.png", "/my images/a.txt"),
        ("/images/a.png", "/labels/a.txt"),
    ],
)
def test_label_rule(image: str, label: str) -> None:
    assert label_path(image) == label


@pytest.mark.parametrize("way", ["absolute", "relative", "no path", "missing path", "list", "list file", "../"])
def test_every_way_to_name_the_images(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path, way: str
) -> None:
    root = make_yolo({"a": [GOOD, None], "b": [GOOD]}, folder="some set")
    (root / "lists").mkdir()
    lines = ["images/a/00.jpg", "", "../images/a/01.jpg", str(root / "images/b/00.jpg")]
    (root / "lists" / "all.txt").write_text("\ufeff" + "\r\n".join(lines), encoding="utf-8")
    head, train, yaml = {
        "absolute": (f"path: {root}\n", "images", tmp_path / "elsewhere.yaml"),
        "relative": ("path: some set\n", "images", tmp_path / "beside.yaml"),
        "no path": ("", "images", root / "data.yaml"),
        "missing path": ("path: ../datasets/gone\n", "images", root / "data.yaml"),
        "list": ("", "[images/a, images/b]", root / "data.yaml"),
        "list file": ("", "lists/all.txt", root / "data.yaml"),
        "../": ("", "../images", root / "data.yaml"),
    }[way]
    yaml.write_text(f"{head}train: {train}\nval: {train}\nnames: {{0: cat, 1: dog}}\nnc: 2\n")
    opened = open_set(yaml)
    assert opened.train is not None
    assert opened.names == ("cat", "dog")
    assert [opened.train.path(row).relative_to(root).as_posix() for row in range(3)] == [
        "images/a/00.jpg",
        "images/a/01.jpg",
        "images/b/00.jpg",
    ]
    assert opened.train.boxes.tolist() == [[22.5, 10, 37.5, 30]] * 2
    assert opened.train.offsets.tolist() == [0, 1, 1, 2]


def test_names_with_spaces_capitals_and_nested_folders(
    tmp_path: Path, write_image: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    for name in ("weiß/Straße 1.JPG", "deep/er/b.PNG", "c.Tiff", ".hidden.jpg"):
        write_image(tmp_path / "images" / name)
        label = tmp_path / "labels" / f"{os.path.splitext(name)[0]}.txt"
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: ['no', 1.0]\n")
    opened = open_set(tmp_path)
    assert opened.train is not None
    assert opened.names == ("no", "1.0")
    assert list(opened.train.paths) == ["images/c.Tiff", "images/deep/er/b.PNG", "images/weiß/Straße 1.JPG"]
    assert len(opened.train.boxes) == 3


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        ("2 0.5 0.5 0.2 0.2", "class", "class 2 is not among the 2 names"),
        ("-1 0.5 0.5 0.2 0.2", "class", "class -1"),
        ("0.5 0.5 0.5 0.2 0.2", "class", "no number of a class"),
        ("1e300 0.5 0.5 0.2 0.2", "class", "no number of a class"),
        ("0 nan 0.5 0.2 0.2", "number", "NaN"),
        ("0 0.5 0.5 inf 0.2", "number", "infinite"),
        ("0 0.1 0.1 nan 0.2 0.3 0.3", "number", "NaN"),
        ("0 0.5 0.5 0 0.2", "degenerate", "no area"),
        ("0 0.5 0.5 -0.2 0.2", "degenerate", "no area"),
        ("0 0.5 0.5 1e-9 0.2", "degenerate", "6e-08 x 8 px and has no area"),
        ("0 inf 0.5 inf 0.2", "number", "infinite"),
        ("0 inf 0.1 -inf 0.2 0.3 0.3", "number", "infinite"),
        ("0 1.2 0.5 0.2 0.2", "range", "outside 0 to 1"),
        ("0 -0.2 0.5 0.2 0.2", "range", "outside 0 to 1"),
        ("0 30 20 10 10", "range", "looks like pixels"),
        ("0 0.5 0.5 0.2", "line", "has 4 numbers"),
        ("0 0.5 0.5 0.2 0.2 0.9", "line", "has 6 numbers"),
        ("cat 0.5 0.5 0.2 0.2", "line", "which is not"),
        (GOOD.strip(), "duplicate", "twice"),
        ("0 0.1 0.5 0.5 0.2", "clipped", "clipped"),
    ],
)
def test_bad_box_is_named_and_the_others_stay(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], line: str, kind: str, words: str
) -> None:
    root = make_yolo({"train": [GOOD + "\n" + line + "\n" + "1 0.5 0.5 0.1 0.1\n"], "val": [GOOD]})
    with warnings.catch_warnings(action="error"):
        opened = open_set(root)
    assert opened.train is not None
    assert opened.report.counts == {kind: 1}
    (finding,) = opened.report.findings
    assert (finding.file, finding.line) == ("labels/train/00.txt", 3)
    assert words in str(finding)
    assert len(opened.train.boxes) == (3 if kind == "clipped" else 2)


def test_rounding_beyond_the_border_is_clipped_without_a_word(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    opened = open_set(make_yolo({"train": ["0 0.5 0.5 1.0005 1.0\n"], "val": [GOOD]}))
    assert opened.train is not None
    assert opened.train.boxes.tolist() == [[0, 0, 60, 40]]
    assert not opened.report.counts


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not text"),
        (b"0 0.5\0 0.5", "zero bytes"),
        ("<html>\n<body>404</body>", "holds no boxes"),
    ],
)
def test_bad_label_file_leaves_its_image_out(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], content: str | bytes, words: str
) -> None:
    opened = open_set(make_yolo({"train": [content] + [GOOD] * 19, "val": [GOOD]}))
    assert opened.train is not None
    assert len(opened.train) == 19
    assert opened.report.counts == {"label": 1}
    assert words in str(opened.report.findings[0])


@pytest.mark.parametrize("content", [b"", b"<html></html>", b"\xff\xd8\xff\xe0"])
def test_bad_image_is_left_out(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], content: bytes
) -> None:
    root = make_yolo({"train": [GOOD] * 20, "val": [GOOD]})
    (root / "images/train/07.jpg").write_bytes(content)
    opened = open_set(root)
    assert opened.train is not None
    assert len(opened.train) == 19
    assert "images/train/07.jpg" not in list(opened.train.paths)
    assert opened.report.findings[0].file == "images/train/07.jpg"


def test_listed_image_that_is_absent(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD] * 20, "val": [GOOD]})
    lines = [f"./images/train/{number:02d}.jpg" for number in range(21)]
    (root / "list.txt").write_text("\n".join(lines))
    (root / "data.yaml").write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    opened = open_set(root)
    assert opened.report.counts == {"absent": 1}
    assert opened.report.findings[0].line == 21
    assert "20.jpg" in str(opened.report.findings[0])


def _make_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere.jpg")


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("x.HEIC", Path.touch, "its image x.HEIC is of a type that is not read; convert it to JPEG or PNG"),
        ("x.gif", Path.touch, "its image x.gif is of a type that is not read"),
        ("x.gif", _make_link, "its image x.gif is a link to nothing"),
        ("x.png", Path.mkdir, "its image x.png is no file"),
        ("X.jpg", lambda path: shutil.copy(path.parent / "00.jpg", path), "the image is called X.jpg"),
        ("x.json", Path.touch, "no image has its name"),
        ("y.gif", Path.touch, "no image has its name"),
    ],
)
def test_label_without_an_image_is_noted_with_its_reason(
    make_yolo: Callable[..., Path],
    open_set: Callable[..., DataSet],
    name: str,
    make: Callable[[Path], object],
    words: str,
) -> None:
    """Also from a stored index, and for as long as it is so; it is no bad file, and no image is lost for it."""
    root = make_yolo({"train": [GOOD] * 4, "val": [GOOD]})
    make(root / "images/train" / name)
    hints = open_set(root).report.counts  # without the label: nothing is wrong
    assert hints == ({"unlabelled": 1} if name == "X.jpg" else {})
    (root / "labels/train/x.txt").write_text(GOOD)
    for _ in range(2):
        opened = open_set(root)
        assert opened.report.counts == {"unpaired": 1, **hints}
        assert str(opened.report.of("note")[0]).startswith(f"labels/train/x.txt: {words}")
        assert opened.report.num_bad_files == 0
        assert opened.report.num_images == (6 if name == "X.jpg" else 5)
    (root / "labels/train/x.txt").unlink()
    assert open_set(root).report.counts == hints


@pytest.mark.parametrize("labelled", [True, False])
def test_image_that_is_a_link_to_nothing_is_missing(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], *, labelled: bool
) -> None:
    """With a label or without one, from the files and from a stored index, until it is mended or removed."""
    root = make_yolo({"train": [GOOD] * 20, "val": [GOOD]})
    link = root / "images/train/x.jpg"
    _make_link(link)
    if labelled:
        (root / "labels/train/x.txt").write_text(GOOD)
    for _ in range(2):
        report = open_set(root).report
        assert report.counts == {"absent": 1}
        assert (report.num_bad_files, report.num_images) == (1, 22)
        assert str(report.findings[0]).startswith("images/train/x.jpg: is a link to nothing; restore")
    shutil.copy(root / "images/train/00.jpg", root / "images/train/nowhere.jpg")
    assert "absent" not in open_set(root).report.counts
    (root / "images/train/nowhere.jpg").unlink()
    assert open_set(root).report.counts == {"absent": 1}
    link.unlink()
    assert "absent" not in open_set(root).report.counts


def test_set_of_links_to_nothing_names_them(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD] * 2, "val": [GOOD]})
    for image in (root / "images/train").iterdir():
        image.unlink()
        image.symlink_to("/nowhere" / image.relative_to(root))
    with pytest.raises(UserError, match=r"2 of 2 images cannot be used.*\n  images/train/00.jpg: is a link to nothing"):
        open_set(root)


def test_label_file_of_two_images_is_named_once(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    """Each is trained on with its boxes, as in other trainers; images of one name without a label share none."""
    root = make_yolo({"train": [GOOD, GOOD, None], "val": [GOOD]})
    for source, copy in (("00.jpg", "00.png"), ("00.jpg", "00.webp"), ("02.jpg", "02.png")):
        shutil.copy(root / "images/train" / source, root / "images/train" / copy)
    for _ in range(2):
        opened = open_set(root)
        assert opened.train is not None
        assert np.diff(opened.train.offsets).tolist() == [1, 1, 1, 1, 0, 0]
        assert opened.report.counts == {"shared": 1, "unlabelled": 2}
        (note,) = opened.report.of("note")
        assert str(note).startswith("labels/train/00.txt: belongs to 00.jpg, 00.png and 00.webp alike; ")
    (root / "images/train/00.png").unlink()
    (root / "images/train/00.webp").unlink()
    assert open_set(root).report.counts == {"unlabelled": 2}


def test_folder_of_other_images_alone_is_noted_too(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    """The image in other letters has a label of its own, so it is no reason."""
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD]})
    for name in ("a", "b"):
        (root / f"images/train/phone/{name}.heic").parent.mkdir(exist_ok=True)
        (root / f"images/train/phone/{name}.heic").touch()
        (root / f"labels/train/phone/{name}.txt").parent.mkdir(exist_ok=True)
        (root / f"labels/train/phone/{name}.txt").write_text(GOOD)
    shutil.copy(root / "images/train/00.jpg", root / "images/train/Y.jpg")
    for name in ("Y", "y"):
        (root / f"labels/train/{name}.txt").write_text(GOOD)
    report = open_set(root).report
    assert [finding.file for finding in report.findings] == [
        "labels/train/phone/a.txt",
        "labels/train/phone/b.txt",
        "labels/train/y.txt",
    ]
    assert ["type that is not read" in finding.message for finding in report.findings] == [True, True, False]
    assert "no image has its name" in report.findings[2].message


def test_labels_of_images_that_a_list_leaves_out_are_not_noted(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    root = make_yolo({"train": [GOOD] * 4, "val": [GOOD]})
    for label in (root / "labels/train").iterdir():
        label.rename(label.with_suffix(".TXT"))
    (root / "list.txt").write_text("images/train/00.jpg\nimages/train/02.jpg\n")
    (root / "data.yaml").write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    opened = open_set(root)
    assert opened.train is not None
    assert len(opened.train.labels) == 2
    assert not opened.report.counts


def test_text_that_is_no_label_is_not_noted(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    """Files of annotation tools, and lists of images, also where labels lie beside images; what a list leaves out."""
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD]})
    for label in (root / "labels/train").iterdir():
        label.rename(root / "images/train" / label.name)
    (root / "images/train").rename(root / "photos")
    for name in ("classes.txt", "notes.txt", "README.txt"):
        (root / "photos" / name).write_text("cat\n")
    (root / "photos/val.txt").write_text("02.jpg\n")
    (root / "data.yaml").write_text("train: photos\nval: photos/val.txt\nnames: [cat, dog]\n")
    opened = open_set(root)
    assert opened.train is not None
    assert (len(opened.train), len(opened.train.labels)) == (3, 3)
    assert not opened.report.counts
    (root / "photos/other.txt").write_text(GOOD)
    assert open_set(root).report.counts == {"unpaired": 1}


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("- a\n- b\n", "not a mapping"),
        ("just text", "not a mapping"),
        ("", "not a mapping"),
        ("train: [", "not valid yaml at line"),
        ("train: images/train\n", "has no `names`"),
        ("names: [a]\n", "names no images"),
        ("train: images/train\nnames: [a, b]\nnc: 3\n", "`nc` is 3"),
        ("train: images/train\nnames: {0: a, 2: b}\n", "no class 1"),
        ("train: images/train\nnames: {x: a}\n", "whole number"),
        ("train: images/train\nnames: cat\n", "list or a map"),
        ("train: images/train\nnames: {0: a, 00: b}\n", "each class one name; write `0: cat`, once"),
        ("train: images/train\nnames: {0: [a]}\n", "each class one name"),
        ("train: images/train\nnc: many\n", "whole number"),
        (f"train: images/train\nnc: {'9' * 5000}\n", "holds '9{100}' where a whole number"),
        (f"train: images/train\nnames: [a]\nx: {'[' * 3000 + ']' * 3000}\n", "too deep"),
        ("train: images/train\nnc: 100000000\n", "no more than 100,000 classes"),
        ("train: {a: b}\nnames: [a]\n", "JSON file and a folder"),
        ("train: images/trian\nnames: [a, b]\n", "did you mean .*train"),
        ("train: data.yaml\nnames: [a, b]\n", "neither a folder nor a .txt list"),
        ("train: empty\nnames: [a, b]\n", "no images found"),
    ],
)
def test_bad_yaml_is_one_sentence(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], yaml: str, words: str
) -> None:
    root = make_yolo({"train": [GOOD]})
    (root / "empty").mkdir()
    (root / "data.yaml").write_text(yaml)
    with pytest.raises(UserError, match=words) as caught:
        open_set(root / "data.yaml")
    assert "\n" not in str(caught.value)


def test_nc_without_names_numbers_the_classes(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD]}, yaml="nc: 3\n")
    assert YoloSource.open(root / "data.yaml").names == ("0", "1", "2")


def test_yaml_that_is_no_text(tmp_path: Path, open_set: Callable[..., DataSet]) -> None:
    (tmp_path / "data.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="is not text"):
        open_set(tmp_path / "data.yaml")


def test_deeppcb(shared: Path, open_set: Callable[..., DataSet]) -> None:
    opened = open_set(shared / "data" / "deeppcb_yolo")
    assert opened.train is not None
    assert opened.val is not None
    assert (len(opened.train), len(opened.val), len(opened.names)) == (1000, 500, 6)
    assert len(opened.train.boxes) + len(opened.val.boxes) == 10_013
    assert not opened.report.counts
    assert (opened.train.sizes == 640).all()


def test_polygons_give_boxes_and_outlines(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    """Also in the order of the file, past lines that are dropped, and not for lines that are plain boxes."""
    lines = "1 0.1 0.5 0.5 0.25 0.5 0.75\n0 0.5 0.5 0.25 0.5\nnonsense\n0 nan 0.1 0.2 0.2 0.3 0.1\n0 0 0 1 0 1 1 0 1\n"
    train = open_set(make_yolo({"train": [GOOD, lines, None], "val": [GOOD]})).train
    assert train is not None
    assert train.labels.tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(train.boxes[1], [6, 10, 30, 30])
    found = [[ring.tolist() for ring in train.polygons.outline(row)] for row in range(4)]
    assert found[0] == found[2] == []
    np.testing.assert_allclose(found[1], [[[6, 20], [30, 10], [30, 30]]], rtol=1e-6)
    np.testing.assert_allclose(found[3], [[[0, 0], [60, 0], [60, 40], [0, 40]]], rtol=1e-6)


_CORNERS = "0 0.5 0.5 0.4 0.4 0.35 0.35 0.6 0.4 0.6 0.6 0 0\n"


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.floats(0, 1), min_size=4, max_size=4)), max_size=4),
    st.integers(1, 17),
    st.integers(2, 3),
    st.data(),
)
def test_keypoints_leave_the_box_as_it_is(
    boxes: list[tuple[int, list[float]]], keypoints: int, numbers: int, data: st.DataObject
) -> None:
    count = keypoints * numbers
    tails = [data.draw(st.lists(st.floats(0, 2), min_size=count, max_size=count)) for _ in boxes]
    bare = [" ".join([str(label), *map(repr, quad)]) for label, quad in boxes]
    posed = [" ".join([line, *map(repr, tail)]) for line, tail in zip(bare, tails, strict=True)]
    expected = YoloLabels().read("\n".join(bare).encode(), _HEADER)
    for lines in (bare, posed):
        assert YoloLabels(keypoints=count).read("\n".join(lines).encode(), _HEADER) == expected


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        ("[4, 2]", _CORNERS),
        ("[2, 3]", "0 0.5 0.5 0.4 0.4 0.35 0.35 1 0.6 0.4 0\n"),
        ("[1, 3]", "0 0.5 0.5 0.4 0.4 1 1 2\n"),
    ],
)
def test_kpt_shape_is_part_of_what_a_set_is(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], shape: str, line: str
) -> None:
    """The same files, opened with it, without it and with it again: no stored index stands in for another."""
    root = make_yolo({"train": [line + GOOD], "val": [GOOD]})
    plain = (root / "data.yaml").read_text()
    x, y, width, height = (float(share) for share in line.split()[1:5])
    expected = [60 * (x - width / 2), 40 * (y - height / 2), 60 * (x + width / 2), 40 * (y + height / 2)]
    polygon = len(line.split()) % 2 == 1
    for posed in (True, False, True):
        (root / "data.yaml").write_text(plain + (f"kpt_shape: {shape}\n" if posed else ""))
        train = open_set(root).train
        assert train is not None
        if posed:
            assert np.allclose(train.boxes, [expected, [22.5, 10, 37.5, 30]])
            assert train.polygons.outline(0) == []
        elif polygon:
            assert not np.allclose(train.boxes[0], expected)
            assert len(train.polygons.outline(0)) == 1
        else:
            assert np.allclose(train.boxes, [[22.5, 10, 37.5, 30]])


def test_line_of_other_length_in_a_set_of_poses_is_named(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    bad = "0 0.1 0.1 0.2 0.2 0.3 0.1\n"
    root = make_yolo({"train": [_CORNERS + bad, GOOD], "val": [GOOD]}, yaml="names: [cat]\nkpt_shape: [4, 2]\n")
    opened = open_set(root)
    assert opened.report.counts == {"line": 1}
    assert "has 7 numbers; a box has 5 (class x y width height), with its keypoints 13" in str(
        opened.report.findings[0]
    )


@pytest.mark.parametrize("shape", ["17", "[17]", "[4, 2, 1]", "[4, x]", "{a: 4}", "[-4, 2]"])
def test_kpt_shape_is_two_numbers(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], shape: str) -> None:
    with pytest.raises(UserError, match="`kpt_shape`"):
        open_set(make_yolo({"train": [GOOD]}, yaml=f"names: [cat]\nkpt_shape: {shape}\n"))


@pytest.mark.parametrize("nothing", ["null", "Null", "NULL", "~", "", "''"])
@pytest.mark.parametrize("classes", ["names: [cat, dog]\n", "nc: 2\n"])
def test_a_key_without_a_value_is_a_key_left_out(make_yolo: Callable[..., Path], nothing: str, classes: str) -> None:
    root = make_yolo({"train": [GOOD]}, yaml=classes)
    text = (root / "data.yaml").read_text()
    expected = YoloSource.open(root / "data.yaml")
    keys = [key for key in ("path", "val", "valid", "test", "names", "nc", "kpt_shape") if f"{key}:" not in text]
    (root / "data.yaml").write_text(text + "".join(f"{key}: {nothing}\n" for key in keys))
    assert YoloSource.open(root / "data.yaml") == expected
    (root / "data.yaml").write_text(f"train: {nothing}\nval: images/train\n{classes}")
    assert YoloSource.open(root / "data.yaml").splits == ("val",)
    (root / "data.yaml").write_text(f"train: images/train\nval: {nothing}\nvalid: images/train\n{classes}")
    assert YoloSource.open(root / "data.yaml").splits == ("train", "val")


@pytest.mark.parametrize("names", ["[null, ~, 'NULL']", "{0: null, 1: ~, 2: NULL}"])
def test_a_class_may_be_called_null(make_yolo: Callable[..., Path], names: str) -> None:
    root = make_yolo({"train": [GOOD]}, yaml=f"names: {names}\n")
    assert YoloSource.open(root / "data.yaml").names == ("null", "~", "NULL")


@pytest.mark.parametrize("train", ["images\\train", "..\\train\\images\\train", "[.\\images\\train]", "all.txt"])
def test_paths_of_windows_lead_to_the_same_files(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path, train: str
) -> None:
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD]}, folder="deep/set")
    if train.startswith("..\\train"):
        (root / "train").mkdir()
        for name in ("images", "labels"):
            os.renames(root / name / "train", root / "train" / name / "train")
    (root / "all.txt").write_bytes(b"images\\train\\00.jpg\r\n.\\images\\train\\01.jpg\r\nimages/train\\02.jpg\r\n")
    text = f"train: {train}\nval: images\\val\nnames: [cat, dog]\n"
    (root / "data.yaml").write_text(text)
    (tmp_path / "beside.yaml").write_text(f"path: .\\deep\\set\n{text}")
    for yaml in (root / "data.yaml", tmp_path / "beside.yaml"):
        opened = open_set(yaml)
        assert not opened.report.counts
        assert opened.train is not None
        assert [os.path.basename(path) for path in opened.train.paths] == ["00.jpg", "01.jpg", "02.jpg"]
        assert len(opened.train.boxes) == 3


def test_a_file_whose_name_holds_a_backslash_comes_first(
    make_yolo: Callable[..., Path], write_image: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    root = make_yolo({"train": [GOOD], "val": [GOOD]})
    write_image(root / "images\\train\\00.jpg", 10, 10)
    (root / "all.txt").write_text("images\\train\\00.jpg")
    (root / "data.yaml").write_text("train: all.txt\nval: images\\val\nnames: [cat, dog]\n")
    source = YoloSource.open(root / "data.yaml")
    assert source.list_files("train").images == [str(root / "images\\train\\00.jpg")]


def test_path_of_windows_that_leads_nowhere_is_named_with_near_ones(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    root = make_yolo({"train": [GOOD]})
    (root / "data.yaml").write_text("train: images\\trian\nnames: [cat, dog]\n")
    with pytest.raises(UserError, match=r"did you mean .*images/train\?"):
        open_set(root)


def test_a_list_finds_the_labels_that_its_folder_does(make_yolo: Callable[..., Path], tmp_path: Path) -> None:
    """Whatever the case of `.txt`, whether all have labels or some, and where one stem has two, the same one."""
    root = make_yolo({"train": [GOOD] * 4 + [None], "val": [GOOD] * 2})
    labels = root / "labels" / "train"
    (labels / "00.txt").rename(labels / "00.TXT")
    (labels / "01.txt").rename(labels / "01.Txt")
    (labels / "02.TXT").write_text("")
    text = "names: [cat, dog]\n"
    for split in ("train", "val"):
        (root / f"{split}.txt").write_text(
            "".join(f"{image}\n" for image in sorted((root / "images" / split).iterdir()))
        )
    (root / "folders.yaml").write_text(
        f"train: images/train\nval: images/val\ntest: [images/train, images/val]\n{text}"
    )
    (root / "lists.yaml").write_text(f"train: train.txt\nval: val.txt\ntest: [train.txt, val.txt]\n{text}")
    (root / "mixed.yaml").write_text(
        f"train: train.txt\nval: val.txt\ntest: [images/train, train.txt, val.txt]\n{text}"
    )
    for split in ("train", "val", "test"):
        expected = YoloSource.open(root / "folders.yaml").list_files(split)
        for yaml in ("lists.yaml", "mixed.yaml"):
            got = YoloSource.open(root / yaml).list_files(split)
            assert got.images == expected.images
            assert got.labels == expected.labels
            assert expected.stamps.items() <= got.stamps.items()
    train = YoloSource.open(root / "lists.yaml").list_files("train").labels
    assert [os.path.basename(label) for label in train] == ["00.TXT", "01.Txt", "02.txt", "03.txt", ""]


def test_a_list_may_name_hidden_images(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD, None]})
    (root / "images/train/00.jpg").rename(root / "images/train/.00.jpg")
    (root / "labels/train/00.txt").rename(root / "labels/train/.00.txt")
    (root / "all.txt").write_text("images/train/.00.jpg\nimages/train/01.jpg")
    (root / "data.yaml").write_text("train: all.txt\nnames: [cat, dog]\n")
    assert YoloSource.open(root / "data.yaml").list_files("train").labels == [str(root / "labels/train/.00.txt"), ""]


@pytest.mark.parametrize("labels", ["none", "file", "locked"])
def test_a_list_without_a_folder_of_labels(
    make_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, labels: str
) -> None:
    root = make_yolo({"train": [None, None]})
    (root / "all.txt").write_text("images/train/00.jpg\nimages/train/01.jpg")
    (root / "data.yaml").write_text("train: all.txt\nnames: [cat, dog]\n")
    source = YoloSource.open(root / "data.yaml")
    if labels == "locked":

        def refuse(folder: str) -> list[str]:
            raise PermissionError(13, "Permission denied", folder)

        monkeypatch.setattr(os, "listdir", refuse)
        with pytest.raises(UserError, match=r"Cannot read the folder .*labels/train: Permission denied"):
            source.list_files("train")
        return
    (root / "labels/train").rmdir()
    if labels == "file":
        (root / "labels/train").touch()
    assert source.list_files("train").labels == ["", ""]
