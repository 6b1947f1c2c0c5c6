"""Opening a data set: splits, options, limits, and what the user is told."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data.check import check_data
from paceline.data.config import DataConfig
from paceline.data.dataset import divide, open_data_set
from paceline.data.index import Index, Strings
from paceline.data.source import recognise
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.data.dataset import DataSet

GOOD = "0 0.5 0.5 0.25 0.5\n"
DOG = "1 0.5 0.5 0.25 0.5\n"


def _index(labelled: list[bool], root: Path) -> Index:
    counts, total = np.array(labelled, np.int64), sum(labelled)
    return Index(
        names=("cat",),
        root=root,
        paths=Strings.of(f"{number}.jpg" for number in range(len(labelled))),
        sizes=np.full((len(labelled), 2), 50, np.int32),
        orientation=np.ones(len(labelled), np.uint8),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=np.tile([[1.0, 2.0, 30.0, 40.0]], (total, 1)),
        labels=np.zeros(total, np.int32),
        crowd=np.zeros(total, np.bool_),
        difficult=np.zeros(total, np.bool_),
        area=np.ones(total),
        image_ids=np.arange(len(labelled)),
        category_ids=np.zeros(1, np.int64),
        origins=np.arange(len(labelled)),
    )


@given(st.lists(st.booleans(), min_size=2, max_size=60), st.integers(0, 2**32))
def test_division_is_a_partition_with_boxes_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, labelled: list[bool], seed: int
) -> None:
    labelled = [True, True, *labelled]
    index = _index(labelled, tmp_path_factory.getbasetemp())
    train, val = divide(index, seed)
    assert sorted([*train.image_ids, *val.image_ids]) == list(range(len(labelled)))
    assert train.targets.any()
    assert val.targets.any()
    assert abs(len(val) - 0.1 * len(labelled)) <= 2
    again = divide(index, seed)
    assert np.array_equal(again[1].image_ids, val.image_ids)


def test_division_depends_on_the_seed(tmp_path: Path) -> None:
    index = _index([True] * 200, tmp_path)
    assert not np.array_equal(divide(index, 0)[1].image_ids, divide(index, 1)[1].image_ids)
    assert len(divide(index, 0)[1]) == 20


def test_set_without_val_is_divided_and_the_log_says_so(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_yolo({"train": [GOOD] * 20})
    with caplog.at_level(logging.INFO, "paceline"):
        opened = open_set(root, seed=3)
    assert opened.train is not None
    assert opened.val is not None
    assert (len(opened.train), len(opened.val)) == (18, 2)
    assert "seed 3 divides its images into 18 for train and 2 for val" in caplog.text
    only_val = open_set(root, seed=3, splits=("val",))
    assert only_val.train is None
    assert only_val.val is not None
    assert list(only_val.val.paths) == list(opened.val.paths)


def test_images_of_val_that_are_trained_on_are_counted(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_yolo({"train": [GOOD] * 5, "val": [GOOD] * 2})
    open_set(root)
    assert "better than they are" not in caplog.text
    (root / "data.yaml").write_text("train: images/train\nval: [images/val, images/train]\nnames: [cat, dog]\n")
    open_set(root)
    assert "5 of the 7 images in val are in train too" in caplog.text


def test_a_key_that_is_given_twice_is_refused(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    names = "names:\n  0: cat\n  1: dog\n"
    open_set(make_yolo({"train": [GOOD], "val": [GOOD]}, names, "sound"))
    with pytest.raises(UserError, match=r"not valid yaml at line 6 \(1 is given twice\)"):
        open_set(make_yolo({"train": [GOOD], "val": [GOOD]}, names + "  1: horse\n", "twice"))
    with pytest.raises(UserError, match=r"not valid yaml at line 4 \(val is given twice\)"):
        open_set(make_yolo({"train": [GOOD], "val": [GOOD]}, "names: [cat, dog]\nval: images/train\n", "val"))


def test_a_path_that_leads_nowhere_is_said(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_yolo({"train": [GOOD], "val": [GOOD]}, "names: [cat, dog]\npath: ../datasets/gone\n")
    with caplog.at_level(logging.INFO, "paceline"):
        open_set(root)
    assert f"no folder `path: ../datasets/gone`; its entries start from {root} instead" in caplog.text


@pytest.mark.parametrize(("named", "folder"), [("data/pets", "data/pets"), ("pets", "datasets/pets")])
def test_a_path_from_the_working_folder_is_found(
    make_yolo: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    named: str,
    folder: str,
) -> None:
    """As other trainers have it; what lies beside the yaml goes before it."""
    files = {"train": [GOOD] * 3, "val": [GOOD]}
    root = make_yolo(files, folder=folder)
    working = root.parents[1]
    configs = working / "configs"
    configs.mkdir()
    (configs / "pets.yaml").write_text(f"path: {named}\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    monkeypatch.chdir(working)
    with caplog.at_level("INFO", "paceline"):
        assert recognise("configs/pets.yaml").root == root
    assert f"its `path: {named}` is {root}." in caplog.text
    beside = make_yolo(files, folder=f"configs/{named}")
    assert recognise("configs/pets.yaml").root == beside


def test_a_set_that_has_its_own_yaml_is_none_of_the_working_folders(
    make_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its `path` may be that of another machine, or of another time."""
    files = {"train": [GOOD] * 3, "val": [GOOD]}
    other = make_yolo(files, folder="datasets/pets")
    root = make_yolo(files, "names: [cat, dog]\npath: pets\n", folder="mine")
    monkeypatch.chdir(other.parents[1])
    assert recognise(str(root)).root == root


def test_single_image_cannot_be_divided(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    with pytest.raises(UserError, match="single image with boxes"):
        open_set(make_yolo({"train": [GOOD]}))


def test_images_without_boxes_are_legal(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    opened = open_set(make_yolo({"train": [None, "", GOOD, "\n\n"], "val": [GOOD]}))
    assert opened.train is not None
    assert opened.train.offsets.tolist() == [0, 0, 0, 1, 1]
    assert opened.report.counts == {"unlabelled": 1}  # an empty file says that there is nothing
    assert opened.report.num_bad_files == opened.report.num_bad_boxes == 0


def test_split_without_any_label_is_refused(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [None, None], "val": [GOOD]})
    with pytest.raises(UserError, match=r"none of its 2 images has a label.*labels/train"):
        open_set(root)


def test_split_without_any_good_box_lists_why(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": ["5 0.5 0.5 0.1 0.1\n"] * 2, "val": [GOOD]})
    with pytest.raises(UserError, match=r"(?s)none of its 2 boxes can be used.*00.txt:1: class 5"):
        open_set(root)


def test_a_tenth_of_bad_files_passes_and_more_stops_with_the_list(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture
) -> None:
    root = make_yolo({"train": [GOOD] * 20, "val": [GOOD]})
    for number in range(2):
        (root / f"images/train/{number:02d}.jpg").write_bytes(b"")
    opened = open_set(root)
    assert opened.train is not None
    assert len(opened.train) == 18
    assert opened.report.num_bad_files == 2
    assert "2 images left out, 0 boxes dropped" in caplog.text
    (root / "images/train/02.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"(?s)3 of 20 images cannot be used.*00.jpg.*01.jpg.*02.jpg: is empty"):
        open_set(root)


def test_long_list_of_bad_files_ends_with_a_count(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    with pytest.raises(UserError) as caught:
        open_set(make_yolo({"train": [b"\xff"] * 30 + [GOOD], "val": [GOOD]}))
    assert str(caught.value).count("\n") == 21
    assert "and 10 more" in str(caught.value)


def test_single_cls_and_classes(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD + DOG, GOOD, DOG], "val": [GOOD + DOG]})
    one, dogs = open_set(root, single_cls=True), open_set(root, classes=(1,))
    assert one.train is not None
    assert dogs.train is not None
    assert one.names == one.train.names == ("object",)
    assert one.train.labels.tolist() == [0, 0, 0, 0]
    assert dogs.names == ("cat", "dog")
    assert dogs.train.labels.tolist() == [1, 1]
    assert dogs.train.offsets.tolist() == [0, 1, 1, 2]
    with pytest.raises(UserError, match="classes names 2"):
        open_set(root, classes=(2,))


def test_classes_that_have_no_box_are_refused(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    with pytest.raises(UserError, match=r"\(val\) has no box of the chosen classes \(dog\)"):
        open_set(make_yolo({"train": [GOOD, DOG], "val": [GOOD]}), classes=(1,))


def test_fraction_thins_train_alone(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [None] * 15 + [GOOD] * 5, "val": [GOOD] * 4})
    for fraction, number in ((0.5, 10), (0.001, 1)):
        opened = open_set(root, fraction=fraction)
        assert opened.train is not None
        assert opened.val is not None
        assert (len(opened.train), len(opened.val)) == (number, 4)
        assert opened.train.targets.any()
    for fraction in (0.0, 1.5):
        with pytest.raises(UserError, match="fraction is"):
            open_set(root, fraction=fraction)


def test_missing_split_is_named(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"val": [GOOD]})
    assert open_set(root, splits=("val",)).val is not None
    for split in ("train", "test"):
        with pytest.raises(UserError, match=f"has no {split} split"):
            open_set(root, splits=(split,))


def _forms(root: Path) -> dict[str, Path]:
    """Describe the YOLO set `root` of train and val in both formats of yaml files, each with a test that is absent."""
    yolo, coco = root / "yolo.yaml", root / "coco.yaml"
    yolo.write_text("train: images/train\nval: images/val\ntest: images/gone\nnames: [cat, dog]\n")
    lines = []
    for split in ("train", "val", "gone"):
        files = sorted((root / "images" / split).glob("*.jpg"))
        document = {
            "images": [{"id": number, "file_name": file.name} for number, file in enumerate(files)],
            "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
            "annotations": [{"image_id": k, "category_id": 1, "bbox": [1, 1, 9, 9]} for k in range(len(files))],
        }
        if files:
            (root / f"{split}.json").write_text(json.dumps(document))
        name = "test" if split == "gone" else split
        lines.append(f"{name}: {{annotations: {split}.json, images: images/{split}}}\n")
    coco.write_text("".join(lines))
    return {"yolo": yolo, "coco": coco}


@pytest.mark.parametrize("form", ["yolo", "coco"])
@pytest.mark.parametrize("gone", ["test", "val", "train"])
def test_split_that_is_not_there_stops_only_what_needs_it(
    make_yolo: Callable[..., Path],
    open_set: Callable[..., DataSet],
    caplog: pytest.LogCaptureFixture,
    form: str,
    gone: str,
) -> None:
    """Otherwise it is named once, with its path, from a scan and from a stored index alike."""
    data = _forms(make_yolo({"train": [GOOD] * 2, "val": [DOG]}))[form]
    if gone != "test":
        data.write_text(data.read_text().replace("gone", "val", 1).replace("gone", "val"))
        data.write_text(data.read_text().replace(f"images/{gone}", "images/gone", 1))
        data.write_text(data.read_text().replace(f"{gone}.json", "gone.json", 1))
    here = tuple(split for split in ("train", "val", "test") if split != gone)
    for _ in range(2):
        caplog.clear()
        opened = open_set(data, splits=here)
        assert all(getattr(opened, split) is not None for split in here)
        said = [text for text in caplog.messages if "does not exist" in text]
        assert len(said) == 1
        assert said[0].startswith(f"{gone} is left out, which nothing here needs: The path ")
        assert "gone" in said[0]
    with pytest.raises(UserError, match=r"gone.*does not exist"):
        open_set(data, splits=(gone,))
    report = check_data(DataConfig(data=str(data)))
    assert report.usable == (gone == "test")
    assert any("gone" in error for error in (report.test_errors if gone == "test" else report.errors))


@pytest.mark.parametrize("content", ["{", "[]", '{"images": [], "categories": []}', "\xff"])
def test_annotation_file_that_is_damaged_stops_only_what_needs_it(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], caplog: pytest.LogCaptureFixture, content: str
) -> None:
    root = make_yolo({"train": [GOOD] * 2, "val": [DOG]})
    data = _forms(root)["coco"]
    (root / "images/gone").mkdir()
    (root / "gone.json").write_text(content, encoding="latin-1")
    opened = open_set(data)
    assert opened.names == ("cat", "dog")
    assert sum("Its categories do not count" in text for text in caplog.messages) == 1
    with pytest.raises(UserError, match=r"gone\.json"):
        open_set(data, splits=("test",))
    assert len(check_data(DataConfig(data=str(data))).test_errors) == 1


def test_missing_path_suggests_near_ones(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD]}, folder="blood cells")
    for wrong in (root.parent / "blood_cell", root.parent / "Blood Cells" / "data.yaml"):
        with pytest.raises(UserError, match=r"does not exist; did you mean .*blood cells\?"):
            open_set(wrong)
    with pytest.raises(UserError, match=r"did you mean .*data\.yaml"):
        open_set(root / "dat.yml")
    with pytest.raises(UserError, match="did you mean shapes"):
        open_set("shape")


@pytest.mark.parametrize("name", ["coco8.yaml", "coco.yaml", "VOC.yaml", "datasets/coco128.yaml", "Objects365"])
def test_sets_that_others_download_are_answered(
    name: str, open_set: Callable[..., DataSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless there is one of nearly that name, which is meant."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"not downloaded, so name .* of a copy that you have, or try data=shapes"):
        open_set(name)
    Path("coco8-mine.yaml").touch()
    with pytest.raises(UserError, match=r"did you mean coco8-mine\.yaml\?"):
        open_set("coco8.yaml")


@pytest.mark.parametrize(
    ("images", "labels", "named"),
    [
        ("train/images", "train/labels", "train/images"),
        ("images/train", "labels/train", "images/train"),
        ("images", "labels", "images"),
        ("train", "train", "train"),
        ("", "", "."),
    ],
)
def test_yolo_labels_without_a_yaml_are_told_what_it_has_to_say(
    images: str,
    labels: str,
    named: str,
    tmp_path: Path,
    write_image: Callable[..., Path],
    open_set: Callable[..., DataSet],
) -> None:
    root = tmp_path / "set"
    write_image(root / images / "a.jpg")
    write_image(root / images / "b.jpg")
    (root / "README.txt").touch()  # or else a folder alone would be the set
    with pytest.raises(UserError, match="is no data set that is known"):
        open_set(root)
    (root / labels).mkdir(parents=True, exist_ok=True)
    for name in ("a", "b"):
        (root / labels / f"{name}.txt").write_text(GOOD)
    with pytest.raises(UserError, match=r"holds YOLO labels, but no data\.yaml") as caught:
        open_set(root)
    assert f"`train: {named}`" in str(caught.value)
    (root / "data.yaml").write_text(f"train: {named}\nnames: [cat, dog]\n")
    opened = open_set(root)
    assert opened.divided


def test_no_box_of_the_chosen_classes_names_them(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    root = make_yolo({"train": [GOOD], "val": [GOOD]})
    with pytest.raises(UserError, match=r"no box of the chosen classes \(dog\)"):
        open_set(root, classes=(1,))
    with pytest.raises(UserError, match=r"no box of the chosen classes \(1\)"):
        open_set(root, classes=(1,), single_cls=True)


def test_entry_of_an_export_is_looked_for_beside_the_yaml(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]
) -> None:
    """`../val/images` of Roboflow means the folder beside the yaml, which the message names."""
    root = make_yolo({"train": [GOOD]})
    (root / "data.yaml").write_text("train: ../images/train\nval: ../valid/images\nnames: [cat, dog]\n")
    with pytest.raises(UserError, match=rf"The path {root}/valid/images, .* \({root}/valid is missing already\)"):
        open_set(root)
    (root / "validx").mkdir()
    with pytest.raises(UserError, match=rf"did you mean {root}/validx\?"):
        open_set(root)


def test_home_is_where_it_is(open_set: Callable[..., DataSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=rf"{tmp_path}/sets/data\.yaml does not exist \({tmp_path}/sets is missing"):
        open_set("~/sets/data.yaml")


def test_what_is_no_data_set_is_refused(tmp_path: Path, open_set: Callable[..., DataSet]) -> None:
    (tmp_path / "set.zip").write_bytes(b"PK")
    (tmp_path / "notes.txt").write_text("hello")
    for name, words in (("set.zip", "unpack it"), ("notes.txt", "no data set"), (".", "no data set that is known")):
        with pytest.raises(UserError, match=words):
            open_set(tmp_path / name)
    with pytest.raises(UserError, match="No data set is named"):
        open_set(" ")


def test_several_yaml_files_are_not_guessed(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD] * 2, "val": [GOOD]})
    (root / "data.yaml").rename(root / "a.yaml")
    assert open_set(root).source == root / "a.yaml"
    (root / "b.yaml").write_text((root / "a.yaml").read_text())
    with pytest.raises(UserError, match="several yaml files"):
        open_set(root)


def test_embedded_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.data import shapes

    monkeypatch.chdir(tmp_path)
    yaml = tmp_path / "made" / "data.yaml"
    monkeypatch.setattr(shapes, "ensure", lambda folder=None: yaml)
    with pytest.raises(UserError, match=str(yaml)):
        open_data_set(DataConfig(data="shapes"), seed=0)
