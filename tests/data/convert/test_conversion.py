"""Conversion as a user meets it: what is lost is said, mistakes are one sentence, nothing half done stays behind."""

from __future__ import annotations

import dataclasses
import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.cli.main import main
from paceline.data.convert import images as images_module
from paceline.data.convert.conversion import ConvertConfig, convert
from paceline.data.convert.losses import losses, require_names
from paceline.data.convert.naming import Places, suffix_of
from paceline.data.convert.yolo import description
from paceline.data.pack.writer import PackConfig, write_pack
from paceline.data.whole_set import WholeSet, open_whole_set
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


def test_what_is_lost_is_counted_once_and_strict_refuses_it(
    coco_set: Path, to: Callable[..., WholeSet], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = to(coco_set, "yolo")
    said = [message for message in caplog.messages if "cannot hold" in message]
    assert len(said) == 1
    for part in ("3 crowd regions (left out)", "9 areas", "4 image ids", "3 category ids"):
        assert part in said[0]
    assert sum(len(index.labels) for index in found.splits.values()) == 9
    with pytest.raises(UserError, match="3 crowd regions"):
        convert(open_whole_set(str(coco_set)), tmp_path / "strict", ConvertConfig(format="yolo", strict=True))
    assert not (tmp_path / "strict").exists()


def test_difficult_boxes_are_left_out_of_yolo(
    voc_set: Path, to: Callable[..., WholeSet], caplog: pytest.LogCaptureFixture
) -> None:
    found = to(voc_set, "yolo")
    assert any("3 difficult boxes (left out)" in message for message in caplog.messages)
    assert sum(len(index.labels) for index in found.splits.values()) == 4


def test_crowds_are_left_out_of_voc(coco_set: Path, to: Callable[..., WholeSet]) -> None:
    found = to(coco_set, "voc")
    assert not any(index.crowd.any() for index in found.splits.values())
    assert sum(len(index.labels) for index in found.splits.values()) == 9


def test_nothing_is_lost_where_nothing_is_there(yolo_set: Path) -> None:
    indexes = list(open_whole_set(str(yolo_set)).splits.values())
    assert {kind: losses(kind, indexes) for kind in ("yolo", "coco", "voc", "pack")} == {
        "yolo": [],
        "coco": [],
        "voc": [],
        "pack": [],
    }


def test_an_image_in_two_splits_of_voc_is_there_once_unless_its_boxes_differ(
    voc_set: Path, to: Callable[..., WholeSet]
) -> None:
    whole = open_whole_set(str(voc_set))
    found = to(whole, "voc")
    assert len(list((found.source / "JPEGImages").iterdir())) == 4  # type: ignore[operator]
    other = whole.splits["val"].select_boxes(~whole.splits["val"].difficult)
    changed = dataclasses.replace(whole, splits={"train": whole.splits["train"], "val": other})
    found = to(changed, "voc")
    assert len(list((found.source / "JPEGImages").iterdir())) == 5  # type: ignore[operator]
    assert len(found.splits["val"].labels) == len(other.labels)
    assert len(found.splits["train"].labels) == len(whole.splits["train"].labels)


def test_links_share_the_file_and_copies_do_not(yolo_set: Path, to: Callable[..., WholeSet]) -> None:
    for link in (False, True):
        index = to(yolo_set, "yolo", link=link).splits["val"]
        pairs = [(yolo_set / "images/val/3.jpg", index.path(row)) for row in range(2) if "3.jpg" in index.paths[row]]
        assert [first.samefile(second) for first, second in pairs] == [link]


def test_where_links_cannot_be_made_images_are_copied(
    yolo_set: Path, to: Callable[..., WholeSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(images_module.os, "link", refuse)
    index = to(yolo_set, "yolo", link=True).splits["test"]
    assert index.path(0).read_bytes() == (yolo_set / "images/test/4.jpg").read_bytes()


def test_pixels_of_a_decoded_pack_become_png(yolo_set: Path, to: Callable[..., WholeSet], tmp_path: Path) -> None:
    whole = open_whole_set(str(yolo_set))
    write_pack(whole.splits, tmp_path / "d.pack", made_from="YOLO", config=PackConfig(decoded=True))
    index = to(tmp_path / "d.pack", "yolo").splits["train"]
    assert {Path(name).suffix for name in index.paths} == {".png"}
    for row, name in enumerate(index.paths):
        source = next(path for path in yolo_set.glob(f"images/train/{name.split('train/')[1][:-4]}.*"))
        if not source.name.startswith("2."):  # which is turned
            assert np.array_equal(cv2.imread(str(index.path(row))), cv2.imread(str(source)))
    write_pack(whole.splits, tmp_path / "r.pack", made_from="YOLO", config=PackConfig(decoded=True, imgsz=32))
    with pytest.raises(UserError, match="reduced for imgsz=32"):
        to(tmp_path / "r.pack", "yolo")
    with pytest.raises(UserError, match="leave out link"):
        to(tmp_path / "d.pack", "yolo", link=True)


def test_a_place_that_is_taken_is_left_alone(yolo_set: Path, tmp_path: Path) -> None:
    whole = open_whole_set(str(yolo_set))
    (tmp_path / "taken").mkdir()
    convert(whole, tmp_path / "taken", ConvertConfig(format="voc"))
    before = sorted((tmp_path / "taken").rglob("*"))
    with pytest.raises(UserError, match="is there already"):
        convert(whole, tmp_path / "taken", ConvertConfig(format="yolo"))
    assert sorted((tmp_path / "taken").rglob("*")) == before


def test_a_vanished_image_is_one_sentence_and_leaves_nothing(yolo_set: Path, tmp_path: Path) -> None:
    whole = open_whole_set(str(yolo_set))
    (yolo_set / "images/train/ü ö.jpg").unlink()
    for kind in ("yolo", "coco", "voc"):
        for link in (False, True):
            with pytest.raises(UserError, match=r"ü ö\.jpg cannot be read .*restore the image"):
                convert(whole, tmp_path / "out", ConvertConfig(format=kind, link=link))  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["yolo"]


def test_a_full_disk_is_one_sentence_and_leaves_nothing(
    yolo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_whole_set(str(yolo_set))
    opened = Path.open

    class Full:
        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(self: Path, mode: str = "r", **options: Any) -> Any:
        return Full() if mode == "wb" else opened(self, mode, **options)

    monkeypatch.setattr(Path, "open", fill)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        convert(whole, tmp_path / "out", ConvertConfig(format="coco"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["yolo"]


_odd = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=400, deadline=None)
@given(st.lists(_odd, min_size=1, max_size=5))
def test_yolo_keeps_any_class_names(names: list[str]) -> None:
    from paceline.data.formats.yaml_file import names_of

    text = description(["train"], names)
    loader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)
    assert names_of(Path("data.yaml"), yaml.load(text.encode().decode(), Loader=loader)) == tuple(names)


@pytest.mark.parametrize("name", [" cat", "cat\n", "", "a\x85b", "a\x01b", "two\nlines"])
def test_voc_refuses_names_that_it_would_change(name: str) -> None:
    require_names("coco", (name,))
    with pytest.raises(UserError, match="rename"):
        require_names("voc", ("dog", name))


def test_voc_refuses_two_classes_of_one_name() -> None:
    require_names("yolo", ("dog", "dog"))
    with pytest.raises(UserError, match="Two classes are called 'dog'"):
        require_names("voc", ("dog", "dog"))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab./ \n\udcff", min_size=1, max_size=9), max_size=12))
def test_places_are_safe_and_never_meet(names: list[str]) -> None:
    places = Places(names)
    taken = [places.take(name, ".jpg") for name in names]
    stems = [place.removesuffix(".jpg") for place in taken]
    assert len(set(stems)) == len(names)
    for stem in stems:
        assert not Path(stem).is_absolute()
        assert stem == stem.strip()
        assert not any(part.startswith(".") or part == "" for part in stem.split("/"))
        assert stem.splitlines() == [stem]
        stem.encode("utf-8")


def test_images_that_differ_in_their_ending_alone_keep_their_own_boxes(
    coco_set: Path, to: Callable[..., WholeSet]
) -> None:
    file = coco_set / "annotations/instances_train.json"
    file.write_text(file.read_text().replace("000000099999.jpg", "000000000139.png"))
    picture = cv2.imread(str(coco_set / "train/000000099999.jpg"))
    cv2.imwrite(str(coco_set / "train/000000000139.png"), picture)
    start = open_whole_set(str(coco_set)).splits["train"]
    for kind in ("yolo", "voc"):
        index = to(coco_set, kind).splits["train"]
        names = {Path(name).name: row for row, name in enumerate(index.paths)}
        assert set(names) == {"000000000139.jpg", "000000000007.jpg", "000000000139-2.png"}
        row = names["000000000139-2.png"]
        own = start.boxes[start.slice(2)][~start.crowd[start.slice(2)]]
        assert np.abs(index.boxes[index.slice(row)] - own).max() < 1e-11


def test_an_unknown_ending_becomes_that_of_the_content() -> None:
    assert suffix_of("a.jpeg", b"") == ".jpeg"
    assert suffix_of("a", b"\xff\xd8\xff") == ".jpg"
    assert suffix_of("a.tmp", b"\x89PNG") == ".png"
    assert suffix_of("a.JPG", b"P6\n# paceline reduction 1") == ".png"


def test_command_line(yolo_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "convert", str(yolo_set), str(tmp_path / "coco"), "--format", "coco"]) == 0
    assert "8 images (train, val, test) as coco" in capsys.readouterr().out
    assert main(["data", "convert", str(tmp_path / "coco"), str(tmp_path / "set.pack")]) == 0
    assert main(["data", "check", str(tmp_path / "set.pack")]) == 0
    capsys.readouterr()
    for words, sentence in (
        ([str(yolo_set), str(tmp_path / "new")], "needs a format"),
        ([str(yolo_set)], "needs a data set and where to write"),
        ([str(yolo_set), str(tmp_path / "coco"), "--format", "voc"], "is there already"),
        ([str(yolo_set), str(tmp_path / "new.pack"), "--link"], "leave out link"),
    ):
        assert main(["data", "convert", *words]) == 2
        assert sentence in capsys.readouterr().err
