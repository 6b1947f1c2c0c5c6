"""The stored scan is used while nothing changes, and only then."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from paceline.data import index as index_module
from paceline.data import index_cache
from paceline.data import scan as scan_module
from paceline.data.headers import REFUSED, BadImage
from paceline.data.index import Index
from paceline.data.index_cache import scan_or_load
from paceline.data.source import recognise
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.headers import Header
    from paceline.data.scan import Scan

GOOD = "0 0.5 0.5 0.25 0.5\n"


@pytest.fixture
def count_scans(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], int]:
    """Return a function that opens the train split, and says how many scans that took."""

    def count(root: Path, cache_folder: Path | None = None) -> int:
        source = recognise(str(root))
        scans = 0
        own = type(source).scan

        def scan(*arguments: object) -> Scan:
            nonlocal scans
            scans += 1
            return own(*arguments)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(type(source), "scan", scan)
            scan_or_load(source, "train", cache_folder)
        return scans

    return count


def test_a_long_scan_is_announced_once(
    make_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_cache, "_MANY", 20)
    few, many = make_yolo({"train": [GOOD] * 19}, folder="few"), make_yolo({"train": [GOOD] * 20})
    caplog.set_level("INFO", "paceline")
    for root in (few, many, many):
        scan_or_load(recognise(str(root)), "train")
    assert [message.split(" of ")[0] for message in caplog.messages] == ["Reading 20 images and labels"]


def test_what_could_not_be_opened_is_tried_again(
    make_yolo: Callable[..., Path], count_scans: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions are mended, and networks come back, without a change of the file's time."""
    root = make_yolo({"train": [GOOD] * 20})
    Image.new("RGB", (20, 10)).save(root / "images/train/03.jpg", "BMP")  # which is read in Python

    def refuse(path: str) -> Header:
        raise BadImage(f"cannot be opened (Permission denied); {REFUSED}")

    with monkeypatch.context() as patch:
        patch.setattr(scan_module, "read_header", refuse)
        for _ in range(2):
            found = scan_or_load(recognise(str(root)), "train")
            assert found.report.counts == {"image": 1}
            assert count_scans(root) == 1
    assert scan_or_load(recognise(str(root)), "train").report.counts == {}
    assert count_scans(root) == 0


def test_second_opening_scans_nothing_and_gives_the_same(
    make_yolo: Callable[..., Path], count_scans: Callable[[Path], int]
) -> None:
    root = make_yolo({"train": [GOOD, None, "0 nan 1 1 1\n" + GOOD]})
    first = scan_or_load(recognise(str(root)), "train")
    assert (root / ".paceline" / "data-train.safetensors").is_file()
    assert count_scans(root) == 0
    second = scan_or_load(recognise(str(root)), "train")
    assert first.report == second.report
    assert np.array_equal(first.index.boxes, second.index.boxes)
    assert list(first.index.paths) == list(second.index.paths)


def _grow_label(root: Path) -> None:
    with (root / "labels/train/00.txt").open("a") as stream:
        stream.write("1 0.5 0.5 0.1 0.1\n")


def _touch_image(root: Path) -> None:
    os.utime(root / "images/train/00.jpg", ns=(1, 1))


def _add_label(root: Path) -> None:
    (root / "labels/train/01.txt").write_text(GOOD)


def _remove_label(root: Path) -> None:
    (root / "labels/train/00.txt").unlink()


def _remove_image(root: Path) -> None:
    (root / "images/train/01.jpg").unlink()


def _add_image(root: Path) -> None:
    shutil.copy(root / "images/train/00.jpg", root / "images/train/99.jpg")


def _rename_class(root: Path) -> None:
    yaml = root / "data.yaml"
    yaml.write_text(yaml.read_text().replace("cat", "tiger"))


@pytest.mark.parametrize(
    "change", [_grow_label, _touch_image, _add_label, _remove_label, _remove_image, _add_image, _rename_class]
)
def test_every_change_is_seen_once(
    make_yolo: Callable[..., Path], count_scans: Callable[[Path], int], change: Callable[[Path], None]
) -> None:
    root = make_yolo({"train": [GOOD, None]})
    assert count_scans(root) == 1
    change(root)
    assert count_scans(root) == 1
    assert count_scans(root) == 0


def test_unrelated_files_change_nothing(make_yolo: Callable[..., Path], count_scans: Callable[[Path], int]) -> None:
    root = make_yolo({"train": [GOOD], "val": [GOOD]})
    count_scans(root)
    (root / "images/train/notes.txt").write_text("hello")
    (root / "labels/train/classes.txt").write_text("cat")
    (root / "labels/val/00.txt").write_text("")
    assert count_scans(root) == 0


def test_moved_set_stays_valid(make_yolo: Callable[..., Path], count_scans: Callable[[Path], int]) -> None:
    root = make_yolo({"train": [GOOD]})
    count_scans(root)
    moved = root.rename(root.parent / "moved")
    assert count_scans(moved) == 0
    assert scan_or_load(recognise(str(moved)), "train").index.path(0).is_file()


@pytest.mark.parametrize(
    "damage", [lambda raw: raw[:-7], lambda raw: b"", lambda raw: raw[:200] + b"\0" * (len(raw) - 200)]
)
def test_torn_file_is_noticed_and_replaced(
    make_yolo: Callable[..., Path],
    count_scans: Callable[[Path], int],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    root = make_yolo({"train": [GOOD]})
    count_scans(root)
    file = root / ".paceline" / "data-train.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    assert count_scans(root) == 1
    assert "damaged" in caplog.text
    assert count_scans(root) == 0


def test_file_of_another_version_is_replaced_without_a_word(
    make_yolo: Callable[..., Path],
    count_scans: Callable[[Path], int],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where that version stored other arrays; an update is no damage."""
    root = make_yolo({"train": [GOOD]})
    with monkeypatch.context() as patch:
        patch.setattr("paceline.data.index._VERSION", "1")
        fewer = {name: dtype for name, dtype in index_module._ARRAYS.items() if name != "origins"}
        patch.setattr("paceline.data.index._ARRAYS", fewer)
        count_scans(root)
    caplog.clear()
    assert count_scans(root) == 1
    assert not caplog.records
    assert count_scans(root) == 0


def test_read_only_set_is_stored_in_the_cache_folder(
    make_yolo: Callable[..., Path], count_scans: Callable[..., int], tmp_path: Path
) -> None:
    root = make_yolo({"train": [GOOD]})
    root.chmod(0o555)
    try:
        assert count_scans(root, tmp_path / "cache") == 1
        assert count_scans(root, tmp_path / "cache") == 0
        assert not (root / ".paceline").exists()
        assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    finally:
        root.chmod(0o755)


def test_set_is_opened_even_where_nothing_can_be_written(
    make_yolo: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("Cannot write: No space left on device; free some space.")

    monkeypatch.setattr(Index, "save", refuse)
    scan = scan_or_load(recognise(str(make_yolo({"train": [GOOD]}))), "train")
    assert len(scan.index) == 1
    assert "No space left" in caplog.text


def test_two_yaml_files_of_one_folder_do_not_replace_each_other(
    make_yolo: Callable[..., Path], count_scans: Callable[[Path], int]
) -> None:
    root = make_yolo({"train": [GOOD]})
    other = root / "other.yaml"
    other.write_text((root / "data.yaml").read_text().replace("dog", "wolf"))
    assert [count_scans(root / "data.yaml"), count_scans(other)] == [1, 1]
    assert [count_scans(root / "data.yaml"), count_scans(other)] == [0, 0]


def test_recipe_is_part_of_the_fingerprint(
    make_yolo: Callable[..., Path], count_scans: Callable[[Path], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_yolo({"train": [GOOD]})
    count_scans(root)
    monkeypatch.setattr(index_cache, "_RECIPE", "another")
    assert count_scans(root) == 1
