"""A scan goes on, and says so, where files are odd, gone or out of reach."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.data import skim
from paceline.data.check import check_data
from paceline.data.config import DataConfig
from paceline.data.headers import BadImage, read_header
from paceline.data.index_cache import scan_or_load
from paceline.data.source import recognise
from paceline.data.stamps import stamp, walk
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from paceline.data.dataset import DataSet

GOOD = "0 0.5 0.5 0.25 0.5\n"
_JPG = frozenset({".jpg"})


@pytest.fixture(params=["with the library", "without it"], autouse=True)
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "without it":
        monkeypatch.setattr(skim, "readers", lambda: None)


def test_files_that_vanish_during_the_scan_are_counted(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 5})
    source = recognise(str(root))
    listing = source.list_files("train")
    (root / "images/train/01.jpg").unlink()
    (root / "labels/train/03.txt").unlink()
    scan = source.scan("train", listing)
    assert scan.report.counts == {"image": 1, "label": 1}
    assert [finding.file for finding in scan.report.findings] == ["images/train/01.jpg", "labels/train/03.txt"]
    assert all("No such file" in str(finding) for finding in scan.report.findings)
    assert [path[-6:] for path in scan.index.paths] == ["00.jpg", "02.jpg", "04.jpg"]
    assert scan.report.num_images == 5
    assert len(scan.index.boxes) == 3


def test_folder_that_becomes_a_file_is_counted(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 3})
    source = recognise(str(root))
    listing = source.list_files("train")
    (root / "labels/train").rename(root / "labels/gone")
    (root / "labels/train").write_text("")
    scan = source.scan("train", listing)
    assert scan.report.counts == {"label": 3}
    assert not len(scan.index)


@pytest.mark.parametrize("place", ["nowhere", "annotations"])
def test_images_without_labels_are_one_sentence(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], place: str
) -> None:
    root = make_yolo({"train": [GOOD] * 300 if place != "nowhere" else [None] * 300, "val": [GOOD]})
    if place != "nowhere":
        (root / "labels" / "train").rename(root / place)
    with pytest.raises(UserError, match=r"none of its 300 images has a label; they are looked for in .*labels.train"):
        open_set(root)


def test_names_that_are_no_utf8_come_back_from_the_store_and_in_findings(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 3})
    images, labels = (os.fsencode(root / kind / "train") for kind in ("images", "labels"))
    os.rename(images + b"/01.jpg", images + b"/caf\xe9.jpg")
    os.rename(labels + b"/01.txt", labels + b"/caf\xe9.txt")
    with open(labels + b"/caf\xe9.txt", "a") as stream:
        stream.write("0 0.5\n")
    for _ in range(2):  # scanned, then loaded
        scan = scan_or_load(recognise(str(root)), "train")
        assert [os.fsencode(path) for path in scan.index.paths][2] == b"images/train/caf\xe9.jpg"
        assert scan.index.path(2).is_file()
        assert len(scan.index.boxes) == 3
        assert os.fsencode(scan.report.findings[0].file) == b"labels/train/caf\xe9.txt"
    report = check_data(DataConfig(data=str(root))).format_text()
    assert "caf" in report
    report.encode()  # as a terminal or a file of UTF-8 has to


def test_links_in_a_circle_are_passed_over(make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD]})
    folder = root / "images" / "train"
    (folder / "self.jpg").symlink_to("self.jpg")
    (folder / "self").symlink_to("self")
    (folder / "ping.jpg").symlink_to("pong.jpg")
    (folder / "pong.jpg").symlink_to("ping.jpg")
    (folder / "up").symlink_to("..")
    assert len(walk(str(folder), _JPG)) == 4  # the last link leads to val, and back here
    opened = open_set(root)
    assert opened.train is not None
    assert opened.report.counts == {"unlabelled": 1}  # that of val by the name that the link gives it


def test_pipes_are_no_images(tmp_path: Path, make_yolo: Callable[..., Path], open_set: Callable[..., DataSet]) -> None:
    root = make_yolo({"train": [GOOD] * 20, "val": [GOOD]})
    os.mkfifo(root / "images/train/pipe.jpg")
    (root / "list.txt").write_text(
        "".join(f"images/train/{k:02d}.jpg\n" for k in range(20)) + "images/train/pipe.jpg\n"
    )
    (root / "data.yaml").write_text("train: list.txt\nval: images/val\nnames: [cat, dog]\n")
    assert stamp(str(root / "images/train/pipe.jpg")) is None
    assert len(walk(str(root / "images/train"), _JPG)) == 20
    opened = open_set(root)  # and does not wait for someone to write into it
    assert opened.report.counts == {"absent": 1}


@pytest.fixture
def forbid() -> Iterator[Callable[[Path], None]]:
    """Return a function that takes all rights to a path away until the test ends."""
    if os.geteuid() == 0:
        pytest.skip("nothing is forbidden to root")
    paths: list[Path] = []

    def take(path: Path) -> None:
        paths.append(path)
        path.chmod(0)

    yield take
    for path in paths:
        path.chmod(0o755)


def test_forbidden_files_are_counted(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], forbid: Callable[[Path], None]
) -> None:
    root = make_yolo({"train": [GOOD] * 30, "val": [GOOD]})
    forbid(root / "images/train/03.jpg")
    forbid(root / "labels/train/05.txt")
    opened = open_set(root)
    assert opened.report.counts == {"image": 1, "label": 1}
    assert all("Permission denied" in str(finding) for finding in opened.report.findings)


def test_forbidden_folder_is_one_sentence(
    make_yolo: Callable[..., Path], open_set: Callable[..., DataSet], forbid: Callable[[Path], None]
) -> None:
    root = make_yolo({"train": [GOOD] * 3, "val": [GOOD]})
    forbid(root / "labels/train")
    with pytest.raises(UserError, match=r"Cannot read the folder .*labels/train: Permission denied"):
        open_set(root)


def test_size_beyond_what_an_index_holds_is_a_bad_image(tmp_path: Path, make_yolo: Callable[..., Path]) -> None:
    root = make_yolo({"train": [GOOD] * 3})
    png = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + b"\xff\xff\xff\xff\0\0\0\1" + b"\x08\0\0\0\0crc!"
    png += b"\0\0\0\0IDATcrc!" + b"\0\0\0\0IENDcrc!"
    (root / "images/train/01.jpg").write_bytes(png)
    with pytest.raises(BadImage, match="4294967295 x 1 pixels"):
        read_header(root / "images/train/01.jpg")
    scan = scan_or_load(recognise(str(root)), "train")
    assert scan.report.counts == {"image": 1}
    assert np.array_equal(scan.index.sizes, [[40, 60], [40, 60]])
