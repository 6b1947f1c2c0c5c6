"""COCO sets: ids, crowds and areas are kept; every layout is found; bad input is named."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from paceline.data.findings import printable
from paceline.data.formats.coco import CocoSource
from paceline.data.formats.coco_file import CocoFile
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.dataset import DataSet
    from paceline.data.scan import Listing, Scan


def _note(image: int = 10, category: int = 3, box: object = (5, 10, 20, 15), **more: object) -> dict[str, object]:
    return {"id": 1, "image_id": image, "category_id": category, "bbox": list(box), **more}  # type: ignore[call-overload]


def test_ids_crowds_and_areas_are_kept(make_coco: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    notes = [
        _note(13, 7, area=99.5),
        _note(10, 3, iscrowd=1, box=(0, 0, 60, 40)),
        _note(10, 7, box=(1, 2, 3, 4)),
        _note(11),
    ]
    opened = open_set(make_coco(notes), splits=("train", "val"))
    assert opened.format == "COCO"
    assert opened.names == ("cat", "dog")
    assert opened.train is not None
    assert opened.val is not None
    found = []
    for index in (opened.train, opened.val):
        assert index.category_ids.tolist() == [3, 7]
        for row in range(len(index)):
            for box in range(*index.slice(row).indices(len(index.boxes))):
                category = int(index.category_ids[index.labels[box]])
                entry = (int(index.image_ids[row]), category, index.boxes[box].tolist(), bool(index.crowd[box]))
                found.append((*entry, float(index.area[box])))
            assert index.path(row).name == f"{index.image_ids[row] - 10}.jpg"
    assert sorted(found) == [
        (10, 3, [0, 0, 60, 40], True, 2400),
        (10, 7, [1, 2, 4, 6], False, 12),
        (11, 3, [5, 10, 25, 25], False, 300),
        (13, 7, [5, 10, 25, 25], False, 99.5),
    ]


def _published(root: Path, images: str, source: Path) -> None:
    """Write the same set as two splits in the published layout."""
    document = json.loads((source / "instances.json").read_text())
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "person_keypoints_train2017.json").write_text("{}")
    for split in ("train2017", "val2017"):
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
        shutil.copytree(source / "images", root / images.format(split))


@pytest.mark.parametrize("images", ["{}", "images/{}"])
def test_published_layout(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path, images: str
) -> None:
    root = tmp_path / "published"
    _published(root, images, make_coco([_note()]))
    opened = open_set(root)
    assert opened.train is not None
    assert opened.val is not None
    assert opened.train.path(0).parent == root / images.format("train2017")
    assert opened.val.path(0).parent == root / images.format("val2017")
    assert len(opened.train) == len(opened.val) == 4


def test_single_file_folders_of_exports_and_yaml_agree(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    root = make_coco([_note(), _note(11), _note(12), _note(13)])
    exported = tmp_path / "exported"
    for name in ("train", "valid"):
        shutil.copytree(root / "images", exported / name)
        shutil.copy(root / "instances.json", exported / name / "_annotations.coco.json")
    (tmp_path / "mine.yaml").write_text(
        "path: coco\ntrain: {annotations: instances.json, images: images}\n"
        "val:\n  annotations: instances.json\n  images: images\n"
    )
    whole, exports, yaml = open_set(root / "instances.json"), open_set(exported), open_set(tmp_path / "mine.yaml")
    assert whole.train is not None
    assert whole.val is not None
    assert len(whole.train) + len(whole.val) == 4
    for opened in (exports, yaml):
        assert opened.train is not None
        assert opened.val is not None
        assert np.array_equal(opened.train.boxes, opened.val.boxes)
        assert len(opened.train.boxes) == 4


def test_file_names_may_hold_the_folder(make_coco: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    images = [{"id": 10 + k, "file_name": f"images/{k}.jpg", "height": 40, "width": 60} for k in range(4)]
    opened = open_set(make_coco([_note(), _note(11)], images=images), splits=("train",))
    assert opened.report.num_bad_files == 0


@pytest.mark.parametrize(
    ("note", "kind"),
    [
        (_note(category=4), "class"),
        (_note(image=99), "line"),
        (_note(box=(1, 2, 3)), "line"),
        ({"image_id": 10, "category_id": 3}, "line"),
        ({"bbox": [1, 2, 3, 4], "category_id": 3}, "line"),
        ({"bbox": [1, 2, 3, 4], "image_id": 10}, "class"),
        (_note(box=(float("nan"), 1, 2, 3)), "number"),
        (_note(box=(1e308, 1, 1e308, 3)), "number"),
        (_note(box=(float("-inf"), 1, float("inf"), 3)), "number"),
        (_note(box=(5, 5, 0, 3)), "degenerate"),
        (_note(box=(5, 5, -3, 3)), "degenerate"),
        (_note(box=(100, 5, 3, 3)), "range"),
        (_note(11), "duplicate"),
        (_note(box=(50, 30, 20, 20)), "clipped"),
    ],
)
def test_bad_annotation_is_named(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], note: dict[str, Any], kind: str
) -> None:
    with warnings.catch_warnings(action="error"):
        opened = open_set(make_coco([_note(11), _note(12), note]), splits=("train",))
    bare = 4 - len({11, 12, note.get("image_id")} & {10, 11, 12, 13})
    assert opened.report.counts == {kind: 1, "unlabelled": bare}
    assert str(opened.report.findings[0]).startswith("instances.json, annotation 3: ")


def test_what_has_no_id_belongs_to_no_image_and_no_category(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    """Not even to those that are called -1."""
    images = [{"id": k - 1, "file_name": f"{k}.jpg"} for k in range(4)]
    categories = [{"id": -1, "name": "cat"}]
    notes = [
        _note(0, -1),
        _note(1, -1),
        {"bbox": [1, 2, 3, 4], "category_id": -1},
        {"bbox": [1, 2, 3, 4], "image_id": -1},
    ]
    opened = open_set(make_coco(notes, images=images, categories=categories), splits=("train",))
    assert opened.report.counts == {"line": 1, "class": 1, "unlabelled": 1}
    words = [str(finding) for finding in opened.report.findings[:2]]
    assert words[0] == "instances.json, annotation 3: has no `image_id` that is a whole number; add it"
    assert words[1] == "instances.json, annotation 4: has no `category_id` that is a whole number; add it"


@pytest.mark.parametrize("value", [0, False, None, "0", "", " false", "No", 1, True, "1", "true"])
@pytest.mark.parametrize("key", ["iscrowd", "difficult"])
def test_flags_may_be_text(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], key: str, value: object
) -> None:
    opened = open_set(make_coco([_note(), _note(11), _note(box=(1, 2, 3, 4), **{key: value})]), splits=("train", "val"))
    up = sum(int(getattr(index, {"iscrowd": "crowd"}.get(key, key)).sum()) for index in (opened.train, opened.val))
    assert up == (value in (1, "1", "true"))


def test_area_that_is_negative_is_none(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    read = CocoFile.read(make_coco([_note(area=-4), _note(area=0), _note(area=7.5)]) / "instances.json")
    assert np.array_equal(read.area, [np.nan, 0, 7.5], equal_nan=True)


def test_image_under_two_ids_is_named(make_coco: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    """Each id has a part of its boxes, and teaches that the others are none."""
    images = [{"id": 10 + k, "file_name": f"{k}.jpg"} for k in range(4)] + [{"id": 99, "file_name": "./1.jpg"}]
    opened = open_set(make_coco([_note(11), _note(99, 7, (1, 2, 3, 4))], images=images), splits=("train",))
    assert opened.report.counts == {"twice": 1, "unlabelled": 3}
    assert str(opened.report.findings[0]) == (
        "images/1.jpg: is listed under the ids 11 and 99; give its boxes to one id"
    )


def test_class_that_is_no_text_is_written_as_one(make_coco: Callable[..., Path]) -> None:
    categories = [{"id": 3, "name": "x\ud800"}, {"id": 7, "name": "ü"}]
    read = CocoFile.read(make_coco([_note()], categories=categories) / "instances.json")
    assert read.categories == {3: "x\\ud800", 7: "ü"}


def test_absent_image_and_other_size_are_named(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], write_image: Callable[..., Path]
) -> None:
    root = make_coco([_note(), _note(11)], num_images=20)
    (root / "images" / "5.jpg").unlink()
    write_image(root / "images" / "6.jpg", 30, 60)
    opened = open_set(root, splits=("train", "val"))
    assert opened.train is not None
    assert opened.val is not None
    assert opened.report.counts == {"absent": 1, "size": 1, "unlabelled": 17}
    assert len(opened.train) + len(opened.val) == 19
    assert 15 not in [*opened.train.image_ids, *opened.val.image_ids]


@pytest.mark.parametrize("form", ["absolute", "parent", "beside"])
def test_images_outside_of_the_folder_are_stamped_too(
    make_coco: Callable[..., Path],
    open_set: Callable[..., DataSet],
    write_image: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    form: str,
) -> None:
    """A set with an image that is absent, broken or changed is read anew once that is mended, and not before."""
    root = make_coco([_note(), _note(11)], num_images=20)
    place = {"absolute": root.parent / "far", "parent": root / "near", "beside": root}[form]
    text = {"absolute": f"{place}/5.jpg", "parent": "../near/5.jpg", "beside": "5.jpg"}[form]
    document = json.loads((root / "instances.json").read_text())
    document["images"][5]["file_name"] = text
    (root / "instances.json").write_text(json.dumps(document))
    (root / "images" / "5.jpg").unlink()
    scans = 0
    own = CocoSource.scan

    def scan(self: CocoSource, split: str, listing: Listing) -> Scan:
        nonlocal scans
        scans += 1
        return own(self, split, listing)

    monkeypatch.setattr(CocoSource, "scan", scan)

    def counts_after(expected: int) -> dict[str, int]:
        found = open_set(root).report.counts
        assert open_set(root).report.counts == found
        assert scans == expected
        return found

    assert counts_after(1) == {"absent": 1, "unlabelled": 17}
    write_image(place / "5.jpg").write_bytes(b"")
    assert counts_after(2) == {"image": 1, "unlabelled": 17}
    write_image(place / "5.jpg")
    assert counts_after(3) == {"unlabelled": 18}
    write_image(place / "5.jpg", 30, 60)
    assert counts_after(4) == {"size": 1, "unlabelled": 18}
    (place / "5.jpg").unlink()
    assert counts_after(5) == {"absent": 1, "unlabelled": 17}
    write_image(place / "5.jpg")
    assert counts_after(6) == {"unlabelled": 18}
    moved = open_set(root.rename(root.parent / "moved"))
    assert moved.report.counts == {"unlabelled": 18}
    for index in (moved.train, moved.val):
        assert index is not None
        assert all(index.path(row).is_file() for row in range(len(index)))


def test_images_inside_of_the_folder_cost_no_further_look(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: str) -> tuple[int, int]:
        raise AssertionError(path)

    monkeypatch.setattr("paceline.data.formats.coco_images.stamp_file", fail)
    monkeypatch.setattr("paceline.data.index_cache.stamp_file", fail)
    root = make_coco([_note(), _note(11)])
    for _ in range(2):
        assert open_set(root).report.counts == {"unlabelled": 2}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"categories": None}, "has no `categories`"),
        ({"images": None}, "has no `images`"),
        ({"categories": [{"id": 1}]}, "every entry of `categories`"),
        ({"images": [{"id": 1}]}, "every entry of `images`"),
        ({"annotations": {}}, "`annotations` is not a list"),
        ({"annotations": None}, "none of its 4 images has a label"),
        ({"annotations": [_note(category=99)]}, "none of its 1 boxes can be used"),
    ],
)
def test_bad_file_is_refused(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], changes: dict[str, object], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        open_set(make_coco([_note()], **changes))


@pytest.mark.parametrize(("text", "words"), [("{", "not valid JSON"), ("[]", "not a COCO annotation file")])
def test_what_is_no_annotation_file_is_refused(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], text: str, words: str
) -> None:
    root = make_coco([_note()])
    (root / "instances.json").write_text(text)
    with pytest.raises(UserError, match=words):
        open_set(root)


def test_yaml_mistakes_are_named(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    make_coco([_note()])
    for text, words in (
        ("train: {annotations: instances.json, images: image}\n", "did you mean .*images"),
        ("train: {annotations: instances.json}\n", "must name a JSON file and a folder"),
        ("train: {annotations: instances.json, images: images}\nnames: [x]\n", "leave `names` out"),
    ):
        (tmp_path / "mine.yaml").write_text("path: coco\n" + text)
        with pytest.raises(UserError, match=words):
            open_set(tmp_path / "mine.yaml")


def test_names_that_a_yaml_gives_later_are_compared_too(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    """A stored index knows nothing of them."""
    make_coco([_note(), _note(11)])
    yaml = tmp_path / "mine.yaml"
    yaml.write_text("path: coco\ntrain: {annotations: instances.json, images: images}\n")
    assert open_set(yaml).names == ("cat", "dog")
    yaml.write_text(yaml.read_text() + "names: [cat, fox]\n")
    with pytest.raises(UserError, match="leave `names` out"):
        open_set(yaml)


def test_image_of_another_size_is_named_by_its_path(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], write_image: Callable[..., Path]
) -> None:
    """Splits often have images of one name."""
    root = make_coco([_note(), _note(11)])
    write_image(root / "images" / "3.jpg", 30, 60)
    assert [finding.file for finding in open_set(root).report.of("note")] == ["images/3.jpg"]


def test_several_files_for_a_split_are_not_guessed(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    root = tmp_path / "published"
    _published(root, "{}", make_coco([_note()]))
    shutil.copy(root / "annotations/instances_train2017.json", root / "annotations/instances_train2014.json")
    with pytest.raises(UserError, match="several annotation files for train"):
        open_set(root)


def test_splits_that_name_a_category_differently_are_refused(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    root = tmp_path / "published"
    _published(root, "{}", make_coco([_note()]))
    file = root / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace('"cat"', '"tiger"'))
    with pytest.raises(UserError, match="category 3 is 'tiger', but 'cat'"):
        open_set(root)


def test_coco33_agrees_with_its_file(shared: Path, open_set: Callable[..., DataSet]) -> None:
    opened = open_set(shared / "data" / "coco33")
    document = json.loads((shared / "data" / "coco33" / "instances.json").read_text())
    assert opened.train is not None
    assert opened.val is not None
    found = []
    for index in (opened.train, opened.val):
        for row, box in zip(index.images_of_boxes, range(len(index.boxes)), strict=True):
            category = int(index.category_ids[index.labels[box]])
            ids = (int(index.image_ids[row]), category, bool(index.crowd[box]))
            found.append((*ids, float(index.area[box]), *index.boxes[box]))
    expected = []
    for entry in document["annotations"]:
        x, y, width, height = entry["bbox"]
        ids = (entry["image_id"], entry["category_id"], bool(entry["iscrowd"]))
        expected.append((*ids, entry["area"], x, y, x + width, y + height))
    assert len(found) == 246
    assert np.allclose(np.array(sorted(found)), np.array(sorted(expected)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        {"counts": [1, 2], "size": [40, 60]},
        [],
        [[1, 2, 3, 4]],
        [[1, 2, 3, 4, 5]],
        [[1, 2, 3, 2e6, 5, 6]],
        [[1, 2, "x", 4, 5, 6]],
        "no",
    ],
)
def test_polygons_are_outlines_and_nothing_else_is(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], segmentation: object
) -> None:
    rings = [[10, 10, 30, 10, 30.5, 20], [1, 1, 5, 1, 5, 5, 1, 5]]
    box = {"image_id": 10, "category_id": 3, "bbox": [10, 10, 20, 10]}
    annotations = [
        box | {"id": 1, "image_id": 12, "segmentation": rings},
        box | {"id": 2, "segmentation": segmentation},
        box | {"id": 3, "image_id": 11, "bbox": [0, 0, 4, 4], "segmentation": rings[1:]},
    ]
    opened = open_set(make_coco(annotations))
    assert opened.train is not None
    assert opened.val is not None
    found = {
        int(part.image_ids[image]): [ring.tolist() for ring in part.polygons.outline(row)]
        for part in (opened.train, opened.val)
        for row, image in enumerate(part.images_of_boxes)
    }
    assert found.get(10) == []
    assert found.get(11) == [[[1, 1], [5, 1], [5, 5], [1, 5]]]
    assert found.get(12) == [[[10, 10], [30, 10], [30.5, 20]], [[1, 1], [5, 1], [5, 5], [1, 5]]]


@pytest.mark.parametrize(
    ("key", "entry", "words"),
    [
        ("images", {"id": 10, "file_name": "b0.jpg"}, "image id 10 is given to 0.jpg and b0.jpg; give each its own"),
        ("images", {"id": 10.0, "file_name": "b\ud800.jpg"}, "image id 10 is given to 0.jpg and b.*ud800.jpg; give"),
        ("categories", {"id": "3", "name": "fox"}, "category id 3 is given to cat and fox; give each its own"),
    ],
)
def test_an_id_belongs_to_one_thing(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], key: str, entry: dict[str, object], words: str
) -> None:
    """Else the boxes of the one would go to the other; an entry that is repeated as it is changes nothing."""
    root = make_coco([_note(), _note(11)])
    plain = CocoFile.read(root / "instances.json")
    document = json.loads((root / "instances.json").read_text())
    repeated = document | {key: document[key] + document[key]}
    (root / "instances.json").write_text(json.dumps(repeated))
    again, opened = CocoFile.read(root / "instances.json"), open_set(root)
    assert again.categories == plain.categories
    assert opened.train is not None
    assert opened.val is not None
    assert len(opened.train) + len(opened.val) == 4
    assert len(opened.train.boxes) + len(opened.val.boxes) == 2
    (root / "instances.json").write_text(json.dumps(document | {key: [*document[key], entry]}))
    with pytest.raises(UserError, match=words) as caught:
        CocoFile.read(root / "instances.json")
    assert str(caught.value).encode()


_NO_IDS = [1 << 62, -(1 << 62), 1 << 63, 1 << 127, float("inf"), float("nan"), 1.5, "9" * 5000, None, [1], "x"]


@pytest.mark.parametrize("number", _NO_IDS, ids=lambda number: str(number)[:20])
@pytest.mark.parametrize("key", ["images", "categories"])
def test_ids_are_whole_numbers_that_64_bits_hold(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], key: str, number: object
) -> None:
    root = make_coco([_note()])
    document = json.loads((root / "instances.json").read_text())
    document[key][0]["id"] = number
    (root / "instances.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=rf"every entry of `{key}` needs an `id` \(a whole number below 2\^62\)"):
        open_set(root)


@pytest.mark.parametrize("number", [*_NO_IDS[:-1], "-1"], ids=lambda number: str(number)[:20])
def test_annotations_of_such_ids_are_named(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], number: object
) -> None:
    notes = [_note(), _note(11), _note() | {"image_id": number}, _note() | {"category_id": number}]
    opened = open_set(make_coco(notes), splits=("train",))
    assert opened.report.counts == {"line": 1, "class": 1, "unlabelled": 2}


@given(st.integers(1 - (1 << 62), (1 << 62) - 1), st.sampled_from([int, str]))
@settings(deadline=None)
def test_ids_come_back(tmp_path_factory: pytest.TempPathFactory, number: int, form: Callable[[int], object]) -> None:
    file = tmp_path_factory.getbasetemp() / "ids.json"
    images = [{"id": form(number), "file_name": "a.jpg"}]
    categories = [{"id": form(number), "name": "cat"}]
    file.write_text(json.dumps({"images": images, "categories": categories}))
    read = CocoFile.read(file)
    assert read.image_ids.tolist() == [number]
    assert read.categories == {number: "cat"}


def test_file_name_that_is_no_text_is_absent(make_coco: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    images = [{"id": 10 + k, "file_name": f"{k}.jpg"} for k in range(20)] + [{"id": 99, "file_name": "x\ud800.jpg"}]
    root = make_coco([_note(), _note(11)], num_images=20, images=images)
    for opened in (open_set(root), open_set(root)):  # the second from the stored index
        assert opened.report.counts == {"absent": 1, "unlabelled": 18}
        assert "x\\ud800.jpg is not in" in str(opened.report.findings[0])


@given(st.text(st.characters(), max_size=9))
@example("x\ud800.jpg")
@example("x\udce9.jpg")
@example("\udce9\ud800")
def test_what_is_printable_can_be_written(text: str) -> None:
    """Any text, with halves of characters in it too; a text that can be written already stays as it is."""
    written = printable(text)
    assert written.encode().decode() == written
    if not any("\ud800" <= letter <= "\udfff" for letter in text):
        assert written == text
    assert printable(written) == written


def test_yaml_of_windows_names_annotations(
    make_coco: Callable[..., Path], open_set: Callable[..., DataSet], tmp_path: Path
) -> None:
    make_coco([_note(), _note(11)]).rename(tmp_path / "deep")
    (tmp_path / "mine.yaml").write_text("train: {annotations: deep\\instances.json, images: .\\deep\\images}\n")
    opened = open_set(tmp_path / "mine.yaml")
    assert opened.train is not None
    assert opened.val is not None
    assert len(opened.train) + len(opened.val) == 4
