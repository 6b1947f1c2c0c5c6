"""Pascal VOC sets: corners as they stand, difficult boxes kept apart, classes from all splits; bad input is named."""

from __future__ import annotations

import shutil
import warnings
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.dataset import DataSet


def test_boxes_and_difficult_ones(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet]
) -> None:
    objects = {
        "a 1": voc_object("dog", (1, 2, 60, 40)) + voc_object("cat", (3.5, 4, 9, 10), difficult=1),
        "b": "",
        "c": voc_object("ant"),
        "d": voc_object("dog"),
    }
    opened = open_set(make_voc(objects, {"train": ["a 1", "b"], "val": ["d.jpg  -1"], "test": ["c"]}))
    assert opened.format == "Pascal VOC"
    assert opened.names == ("ant", "cat", "dog")
    assert opened.train is not None
    assert opened.val is not None
    assert opened.test is None
    assert list(opened.train.paths) == ["JPEGImages/a 1.jpg", "JPEGImages/b.jpg"]
    assert opened.train.boxes.tolist() == [[1, 2, 60, 40], [3.5, 4, 9, 10]]
    assert opened.train.labels.tolist() == [2, 1]
    assert opened.train.difficult.tolist() == [False, True]
    assert opened.train.targets.tolist() == [True, False]
    assert opened.train.offsets.tolist() == [0, 2, 2]


def test_trainval_is_divided_and_test_stays_apart(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet]
) -> None:
    names = [f"{number:02d}" for number in range(30)]
    root = make_voc(dict.fromkeys(names, voc_object("cat")), {"trainval": names[:20], "test": names[20:]})
    opened = open_set(root, splits=("train", "val", "test"))
    assert opened.train is not None
    assert opened.val is not None
    assert opened.test is not None
    assert (len(opened.train), len(opened.val), len(opened.test)) == (18, 2, 10)
    assert not {*opened.train.paths, *opened.val.paths} & {*opened.test.paths}


@pytest.mark.parametrize("file", ["classes.txt", "names.txt"])
def test_list_of_classes_decides(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet], file: str
) -> None:
    root = make_voc({"a": voc_object("dog") + voc_object("wolf", (0, 0, 5, 5)), "b": voc_object("cat")})
    (root / file).write_text("dog\ncat\n\nowl\n")
    opened = open_set(root, splits=("train", "val"))
    assert opened.names == ("dog", "cat", "owl")
    assert opened.report.counts == {"class": 1}
    assert str(opened.report.findings[0]).startswith("Annotations/a.xml, object 2: the class 'wolf'")


@pytest.mark.parametrize(
    ("box", "kind"),
    [
        (("nan", 1, 5, 5), "number"),
        ((5, 5, 5, 9), "degenerate"),
        ((9, 5, 5, 9), "degenerate"),
        ((61, 5, 70, 9), "range"),
        ((50, 5, 70, 9), "clipped"),
        (("x", 5, 70, 9), "line"),
        ((-1e308, 5, 1e308, 9), "clipped"),
        ((10, 10, 30, 20), "duplicate"),
    ],
)
def test_bad_box_is_named(
    make_voc: Callable[..., Path],
    voc_object: Callable[..., str],
    open_set: Callable[..., DataSet],
    box: tuple[object, ...],
    kind: str,
) -> None:
    root = make_voc({"a": voc_object("dog") + voc_object("dog", box), "b": voc_object("dog")})
    with warnings.catch_warnings(action="error"):
        opened = open_set(root)
    assert opened.report.counts == {kind: 1}
    assert opened.report.findings[0].line == 2


@pytest.mark.parametrize("content", ["", "<annotation><object>", "<html></html>"])
def test_annotation_that_is_none_leaves_its_image_out(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet], content: str
) -> None:
    root = make_voc({f"{number:02d}": voc_object("dog") for number in range(20)})
    (root / "Annotations" / "03.xml").write_text(content)
    opened = open_set(root)
    assert opened.report.counts == {"label": 1}
    assert opened.report.findings[0].file == "Annotations/03.xml"


def test_other_size_and_absent_image_are_named(
    make_voc: Callable[..., Path],
    voc_object: Callable[..., str],
    open_set: Callable[..., DataSet],
    write_image: Callable[..., Path],
) -> None:
    names = [f"{number:02d}" for number in range(20)]
    root = make_voc(dict.fromkeys(names, voc_object("dog")), {"train": [*names, "gone"], "val": names})
    write_image(root / "JPEGImages" / "03.jpg", 41, 60)
    opened = open_set(root, splits=("train",))
    assert opened.report.counts == {"absent": 1, "size": 1}
    assert opened.report.num_boxes == 20
    assert str(opened.report.findings[0]).startswith("ImageSets/Main/train.txt:21: the image gone is not in")


def test_annotations_are_parsed_for_their_names_once(
    make_voc: Callable[..., Path],
    voc_object: Callable[..., str],
    open_set: Callable[..., DataSet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However many splits there are; they all have the names of all of them."""
    parsed: list[str] = []
    own = ElementTree.parse

    def parse(path: str) -> object:
        parsed.append(path)
        return own(path)

    monkeypatch.setattr(ElementTree, "parse", parse)
    objects = {"a": voc_object("dog"), "b": voc_object("cat"), "c": voc_object("ant"), "d": ""}
    root = make_voc(objects, {"train": ["a", "d"], "val": ["b"], "test": ["c"]})
    assert open_set(root, splits=("train", "val", "test")).names == ("ant", "cat", "dog")
    assert len(parsed) == len(set(parsed)) == 4


def test_set_without_objects_is_refused(make_voc: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    with pytest.raises(UserError, match=r"No annotation in .* names an object"):
        open_set(make_voc({"a": "", "b": ""}))


def test_bccd(shared: Path, open_set: Callable[..., DataSet]) -> None:
    opened = open_set(shared / "data" / "bccd_voc", splits=("train", "val", "test"))
    assert opened.train is not None
    assert opened.val is not None
    assert opened.test is not None
    assert opened.names == ("Platelets", "RBC", "WBC")
    assert (len(opened.train), len(opened.val), len(opened.test)) == (205, 87, 72)
    assert len(opened.train.boxes) + len(opened.val.boxes) + len(opened.test.boxes) == 4886
    assert opened.report.counts == {"degenerate": 2}


def test_annotation_of_two_images_and_a_link_to_nothing_are_named(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet]
) -> None:
    root = make_voc({f"{number:02d}": voc_object("cat") for number in range(20)})
    shutil.copy(root / "JPEGImages/03.jpg", root / "JPEGImages/03.png")
    link = root / "JPEGImages/07.jpg"
    link.unlink()
    link.symlink_to("nowhere.jpg")
    for _ in range(2):
        report = open_set(root).report
        assert report.counts == {"absent": 1, "shared": 1}
        assert [str(finding).partition(";")[0] for finding in report.findings] == [
            "JPEGImages/07.jpg: is a link to nothing",
            "Annotations/03.xml: belongs to 03.jpg and 03.png alike",
        ]
    link.unlink()
    assert open_set(root).report.counts == {"unpaired": 1, "shared": 1}


@pytest.mark.parametrize("chosen", ["03.jpg", "03.png"])
def test_list_chooses_between_files_of_one_name(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet], chosen: str
) -> None:
    names = [f"{number:02d}" for number in range(20)]
    root = make_voc(dict.fromkeys(names, voc_object("dog")), {"train": [chosen, "04"], "val": names[5:]})
    shutil.copy(root / "JPEGImages/03.jpg", root / "JPEGImages/03.png")
    train = open_set(root).train
    assert train is not None
    assert list(train.paths) == [f"JPEGImages/{chosen}", "JPEGImages/04.jpg"]


@pytest.mark.parametrize(
    ("text", "is_set"), [("1", True), (" true ", True), ("0", False), ("", False), ("Unspecified", False)]
)
def test_difficult_as_it_is_written(
    make_voc: Callable[..., Path],
    voc_object: Callable[..., str],
    open_set: Callable[..., DataSet],
    text: str,
    is_set: bool,
) -> None:
    entry = voc_object("dog", (1, 2, 3, 4)).replace("<difficult>0<", f"<difficult>{text}<")
    train = open_set(
        make_voc({"a": voc_object("dog") + entry, "b": voc_object("dog")}, {"train": ["a"], "val": ["b"]})
    ).train
    assert train is not None
    assert train.difficult.tolist() == [False, is_set]


def test_size_of_thousands_of_digits_is_none(
    make_voc: Callable[..., Path], voc_object: Callable[..., str], open_set: Callable[..., DataSet]
) -> None:
    root = make_voc({name: voc_object("dog") for name in "ab"})
    file = root / "Annotations" / "a.xml"
    file.write_text(file.read_text().replace("<width>60<", f"<width>{'9' * 5000}<"))
    assert not open_set(root).report.counts
