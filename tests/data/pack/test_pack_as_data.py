"""A pack as the data of a run: the same batches as from the files, all options, the check, and the command line."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import cv2
import numpy as np
import pytest

from paceline.cli.main import main
from paceline.data.check import check_data
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import EvalLoader, TrainLoader
from paceline.data.pack.reader import Pack
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from paceline.data.index import Index


@pytest.fixture
def data(make_yolo: Callable[..., Path]) -> Path:
    """A set of 12 images for training and 4 for validation, with pictures that differ."""
    lines = [f"{number % 2} 0.5 0.5 0.{number % 9 + 1} 0.5\n" for number in range(12)]
    root = make_yolo({"train": lines, "val": [*lines[:3], ""]})
    random = np.random.default_rng(0)
    for path in sorted(root.glob("images/*/*.jpg")):
        cv2.imwrite(str(path), random.integers(0, 256, (96, 128, 3), np.uint8))
    return root


_IMGSZ = {"encoded.pack": 64, "decoded.pack": 128, "reduced.pack": 64}
"""Sides at which the pixels are the same to the bit: at 64, a JPEG reduces in its decoder what pixels average."""


@pytest.fixture(params=["encoded", "decoded", "reduced"])
def pack(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Path:
    out = tmp_path / f"{request.param}.pack"
    words = {"encoded": [], "decoded": ["--decoded"], "reduced": ["--decoded", "--imgsz", "64"]}[request.param]
    assert main(["data", "pack", str(data), str(out), *words]) == 0
    return out


def _same_batches(first: Index, second: Index, imgsz: int) -> None:
    config = DataConfig(imgsz=imgsz, batch=4, workers=2)
    with (
        TrainLoader(first, config, AugmentConfig(), 7) as files,
        TrainLoader(second, config, AugmentConfig(), 7) as packed,
    ):
        for one, other in zip(files.epoch(0, mosaic=True), packed.epoch(0, mosaic=True), strict=True):
            assert one.images.equal(other.images)
            assert one.boxes.equal(other.boxes)
            assert one.labels.equal(other.labels)
    with EvalLoader(first, imgsz, 3) as files_eval, EvalLoader(second, imgsz, 3) as packed_eval:
        for one, other in zip(files_eval, packed_eval, strict=True):
            assert one.images.equal(other.images)
            assert one.boxes.equal(other.boxes)
            assert one.samples.equal(other.samples)


def test_batches_are_those_of_the_files(data: Path, pack: Path) -> None:
    sets = [open_data_set(DataConfig(data=str(path), imgsz=_IMGSZ[pack.name]), seed=0) for path in (data, pack)]
    assert sets[1].format == "pack"
    for split in ("train", "val"):
        _same_batches(getattr(sets[0], split), getattr(sets[1], split), _IMGSZ[pack.name])


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
def test_every_cache_holds_the_same(data: Path, pack: Path, cache: Literal["none", "ram", "disk"]) -> None:
    imgsz = _IMGSZ[pack.name]
    batches = []
    for path in (data, pack):
        index = open_data_set(DataConfig(data=str(path), imgsz=imgsz), seed=0).train
        assert index is not None
        config = DataConfig(imgsz=imgsz, batch=4, workers=2, cache=cache)
        with TrainLoader(index, config, AugmentConfig(), 7) as loader:
            batches.append([batch.images.clone() for epoch in (0, 1) for batch in loader.epoch(epoch, mosaic=True)])
    assert all(first.equal(second) for first, second in zip(*batches, strict=True))


@pytest.mark.parametrize(
    "options", [{"fraction": 0.5}, {"single_cls": True}, {"classes": (1,)}, {"classes": (0,), "single_cls": True}]
)
def test_options_choose_the_same(data: Path, pack: Path, options: dict[str, object]) -> None:
    sets = [
        open_data_set(DataConfig(data=str(path), imgsz=_IMGSZ[pack.name], **options), seed=3) for path in (data, pack)
    ]  # type: ignore[arg-type]
    assert sets[0].names == sets[1].names
    for split in ("train", "val"):
        first, second = (getattr(found, split) for found in sets)
        assert list(first.paths) == list(second.paths)
        assert np.array_equal(first.labels, second.labels)
        _same_batches(first, second, _IMGSZ[pack.name])


def test_a_set_without_val_is_divided_as_before(make_yolo: Callable[..., Path], tmp_path: Path) -> None:
    root = make_yolo({"train": ["0 0.5 0.5 0.25 0.5\n"] * 20})
    assert main(["data", "pack", str(root), str(tmp_path / "set.pack")]) == 0
    sets = [open_data_set(DataConfig(data=str(path)), seed=5) for path in (root, tmp_path / "set.pack")]
    for split in ("train", "val"):
        first, second = (getattr(found, split) for found in sets)
        assert list(first.paths) == list(second.paths)
        _same_batches(first, second, 64)


def test_opening_looks_at_no_image(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["data", "pack", str(data), str(tmp_path / "set.pack")])
    monkeypatch.setattr(Pack, "read", lambda *_: pytest.fail("an image was read"))
    found = open_data_set(DataConfig(data=str(tmp_path / "set.pack")), seed=0)
    assert found.train is not None
    assert len(found.train) == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["set", "set.pack"], "no index is stored beside it"


def test_a_reduced_pack_refuses_a_larger_input(data: Path, tmp_path: Path) -> None:
    main(["data", "pack", str(data), str(tmp_path / "set.pack"), "--decoded", "--imgsz", "64"])
    open_data_set(DataConfig(data=str(tmp_path / "set.pack"), imgsz=32), seed=0)
    with pytest.raises(UserError, match="reduced for imgsz=64, so imgsz=96"):
        open_data_set(DataConfig(data=str(tmp_path / "set.pack"), imgsz=96), seed=0)
    config = DataConfig(data=str(tmp_path / "set.pack"), imgsz=64, batch=4, workers=1)
    index = open_data_set(config, seed=0).train
    assert index is not None
    with TrainLoader(index, config, AugmentConfig(), 0) as loader:
        assert len(loader.faults) == 0
    with pytest.raises(UserError, match=r"multi_scale=0\.5, which goes up to 96 px, has too few pixels"):
        TrainLoader(index, config, AugmentConfig(multi_scale=0.5), 0)


def test_damaged_images_are_counted_and_replaced(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    main(["data", "pack", str(data), str(path)])
    _damage(path, 1)
    index = open_data_set(DataConfig(data=str(path)), seed=0).train
    assert index is not None
    with TrainLoader(index, DataConfig(imgsz=64, batch=4), AugmentConfig(), 0) as loader:
        seen = [sample for batch in loader.epoch(0, mosaic=False) for sample in batch.samples.tolist()]
    assert len(seen) == 12
    assert loader.stats()["broken"] == 1
    for entry in (2, 3):
        _damage(path, entry)
    index = open_data_set(DataConfig(data=str(path)), seed=0).train
    assert index is not None
    with (
        TrainLoader(index, DataConfig(imgsz=64, batch=4), AugmentConfig(), 0) as loader,
        pytest.raises(UserError, match="cannot be read any more"),
    ):
        list(loader.epoch(0, mosaic=False))


def _damage(path: Path, entry: int) -> None:
    content = bytearray(path.read_bytes())
    content[int(Pack.open(path)._entries["starts"][entry]) + 100] ^= 255
    path.write_bytes(content)


def test_the_check_reads_every_image(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.pack"
    main(["data", "pack", str(data), str(path), "--splits", "val,train"])
    assert main(["data", "check", str(path)]) == 0
    text = capsys.readouterr().out
    assert "Nothing is wrong" in text
    assert "train: 12 images" in text
    _damage(path, 1)
    report = check_data(DataConfig(data=str(path)))
    assert report.report.counts == {"image": 1}
    assert "01.jpg is damaged in the pack" in report.format_text().replace("01.jpg:", "01.jpg")


def test_the_check_names_what_is_damaged_in_order(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of threads, and across their shares of the images."""
    path = tmp_path / "set.pack"
    main(["data", "pack", str(data), str(path)])
    monkeypatch.setattr("paceline.data.chunks.CHUNK", 2)
    for entry in (9, 1, 4):
        _damage(path, entry)
    report = check_data(DataConfig(data=str(path))).report
    assert [finding.file[-6:] for finding in report.findings] == ["01.jpg", "04.jpg", "09.jpg"]
    assert report.counts == {"image": 3}


def test_a_pack_that_is_cut_off_stops_the_epoch_with_one_sentence(data: Path, tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    main(["data", "pack", str(data), str(path)])
    index = open_data_set(DataConfig(data=str(path)), seed=0).train
    assert index is not None
    with TrainLoader(index, DataConfig(imgsz=64, batch=4, cache="none"), AugmentConfig(), 0) as loader:
        os.truncate(path, 4096)
        with pytest.raises(UserError, match="cut off or written over while it was in use"):
            list(loader.epoch(0, mosaic=False))
        assert loader.stats()["broken"] == 0


def test_images_in_two_splits_are_found(data: Path, tmp_path: Path) -> None:
    (data / "images/val/00.jpg").write_bytes((data / "images/train/05.jpg").read_bytes())
    main(["data", "pack", str(data), str(tmp_path / "set.pack")])
    found = [check_data(DataConfig(data=str(path))).repeated for path in (data, tmp_path / "set.pack")]
    assert found[0] == found[1] == (("train: 05.jpg", "val: 00.jpg"),)


def test_plots_and_mistakes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.pack"
    main(["data", "pack", str(data), str(path)])
    assert main(["data", "plot", str(path), str(tmp_path / "plot.svg")]) == 0
    assert (tmp_path / "plot.svg").is_file()
    path.write_bytes(b"something else")
    for words, sentence in (
        (["check", str(path)], "is no pack, or its beginning is damaged"),
        (["pack", str(data)], "needs a data set and where to write"),
        (["pack", str(data), str(path), "--imgsz", "64"], "add --decoded"),
        (["pack", str(data), str(path), "--splits", "test"], "has no test split"),
        (["check", "gs://bucket/set.pack"], "gs:// is not offered"),
    ):
        assert main(["data", *words]) == 2
        assert sentence in capsys.readouterr().err
