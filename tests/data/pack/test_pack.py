"""Packs: what goes in comes out, equal input gives equal bytes, and no damage goes unnoticed."""

from __future__ import annotations

import dataclasses
import errno
import gc
import io
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from paceline.data.decode import decode_compact
from paceline.data.headers import BadImage
from paceline.data.index import Index, Strings
from paceline.data.pack import writer
from paceline.data.pack.layout import COLUMNS, HEADER, MAGIC, Directory, Header, TornPackError
from paceline.data.pack.medium import LocalFile
from paceline.data.pack.reader import Pack
from paceline.data.pack.store import store_of
from paceline.data.pack.writer import PackConfig, write_pack
from paceline.data.polygons import Polygons
from paceline.data.store import FileStore
from paceline.data.whole_set import open_whole_set
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

_PER_IMAGE = ("sizes", "orientation", "image_ids", "offsets")
_PER_BOX = ("boxes", "labels", "crowd", "difficult", "area")


def _equal(first: Index, second: Index, skip: tuple[str, ...] = ()) -> bool:
    names = [name for name in (*_PER_IMAGE, *_PER_BOX, "category_ids", "origins") if name not in skip]
    arrays = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)
    first_polygons, second_polygons = first.polygons, second.polygons
    arrays &= all(
        np.array_equal(getattr(first_polygons, name), getattr(second_polygons, name))
        for name in ("points", "rings", "boxes")
    )
    return arrays and first.names == second.names and list(first.paths) == list(second.paths)


def _pack(splits: dict[str, Index], out: Path, **config: Any) -> Pack:
    write_pack(splits, out, made_from="YOLO", config=PackConfig(**config))
    return Pack.open(out)


@pytest.fixture
def data(make_yolo: Callable[..., Path]) -> dict[str, Index]:
    root = make_yolo({"train": ["0 0.5 0.5 0.25 0.5\n", "", "1 0.3 0.3 0.1 0.2\n" * 2, None], "val": ["1 .5 .5 .2 .2"]})
    return dict(open_whole_set(str(root)).splits)


def _index(root: Path, boxes_of: list[int], seed: int, names: tuple[str, ...]) -> Index:
    """An index with random content; its images are files of random bytes."""
    random = np.random.default_rng(seed)
    total = sum(boxes_of)
    paths = [f"a b/ü{number}.jpg" for number in range(len(boxes_of))]
    for path in paths:
        (root / path).parent.mkdir(exist_ok=True, parents=True)
        (root / path).write_bytes(random.bytes(int(random.integers(1, 300))))
    return Index(
        names=names,
        root=root,
        paths=Strings.of(paths),
        sizes=random.integers(1, 5000, (len(boxes_of), 2), np.int32),
        orientation=random.integers(1, 9, len(boxes_of)).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(boxes_of)]).astype(np.int64),
        boxes=random.uniform(0, 5000, (total, 4)),
        labels=random.integers(0, len(names), total, np.int32),
        crowd=random.random(total) < 0.5,
        difficult=random.random(total) < 0.5,
        area=random.uniform(0, 1e6, total),
        image_ids=random.integers(-(2**62), 2**62, len(boxes_of)),
        category_ids=np.sort(random.choice(1000, len(names), replace=False)),
        origins=np.arange(len(boxes_of)),
        polygons=Polygons.of(
            [random.uniform(-9, 5000, (3 + ring, 2)) for ring in range(box % 3)] for box in range(total)
        ),
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    boxes_of=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    seed=st.integers(0, 2**32 - 1),
    names=st.lists(st.text(max_size=8), min_size=1, max_size=4),
)
def test_everything_comes_back(
    boxes_of: list[int], seed: int, names: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    index = _index(folder / "set", boxes_of, seed, tuple(names))
    pack = _pack({"train": index}, folder / "set.pack")
    found = pack.index("train")
    assert _equal(found, index)
    files, entries = FileStore(index), store_of(found)
    assert all(entries.read(row) == files.read(row) for row in range(len(index)))
    rows = np.arange(len(index))[::-1]
    turned = store_of(found.select_images(rows).select_boxes(found.select_images(rows).targets))
    assert [turned.read(row) for row in range(len(index))] == [files.read(int(row)) for row in rows]


def test_equal_input_gives_equal_bytes(data: dict[str, Index], tmp_path: Path) -> None:
    contents = []
    for threads in (1, 4):
        for decoded in (False, True):
            config = PackConfig(decoded=decoded)
            write_pack(data, tmp_path / "set.pack", made_from="YOLO", config=config, threads=threads)
            contents.append((tmp_path / "set.pack").read_bytes())
    assert contents[:2] == contents[2:]
    assert contents[0] != contents[1]
    moved = Path(shutil.copytree(data["train"].root, tmp_path / "elsewhere"))
    again = dict(open_whole_set(str(moved)).splits)
    _pack(again, tmp_path / "again.pack")
    assert (tmp_path / "again.pack").read_bytes() == contents[0], "neither the place nor the time is in a pack"


def test_a_pack_of_a_pack_is_the_same_pack(data: dict[str, Index], tmp_path: Path) -> None:
    first = _pack(data, tmp_path / "first.pack")
    second = {split: first.index(split) for split in first.splits}
    _pack(second, tmp_path / "second.pack")
    assert (tmp_path / "first.pack").read_bytes() == (tmp_path / "second.pack").read_bytes()


def test_splits_names_and_order(data: dict[str, Index], tmp_path: Path) -> None:
    pack = _pack({"val": data["val"], "train": data["train"]}, tmp_path / "set.pack")
    assert pack.splits == ("train", "val")
    assert pack.names == ("cat", "dog")
    assert _equal(pack.index("val"), data["val"])
    assert str(pack.index("val").path(0)) == str(tmp_path / "set.pack/images/val/00.jpg")


def test_an_image_in_two_splits_is_there_once(data: dict[str, Index], tmp_path: Path) -> None:
    train = data["train"]
    pack = _pack({"train": train, "val": train.select_images(np.array([2, 0]))}, tmp_path / "set.pack")
    assert len(pack) == len(train)
    assert pack.index("val").packed.entries.tolist() == [2, 0]


def test_names_never_lead_out_of_the_set(data: dict[str, Index], tmp_path: Path) -> None:
    root = tmp_path / "inner/deep"
    root.mkdir(parents=True)
    (tmp_path / "inner/a.jpg").write_bytes(b"one")
    (tmp_path / "b.jpg").write_bytes(b"two")
    names = Strings.of(["../a.jpg", str(tmp_path / "b.jpg")])
    index = _index(root, [0, 0], 0, ("cat",))
    index = Index(**{name: getattr(index, name) for name in Index.__dataclass_fields__} | {"paths": names})
    found = _pack({"train": index}, tmp_path / "set.pack").index("train")
    assert found.paths[0] == "a.jpg"
    assert not any(Path(name).is_absolute() or ".." in Path(name).parts for name in found.paths)
    assert [store_of(found).read(row) for row in (0, 1)] == [b"one", b"two"]


@pytest.mark.parametrize("imgsz", [0, 32, 64])
def test_decoded_pixels_are_those_of_the_files(
    imgsz: int, write_image: Callable[..., Path], tmp_path: Path, make_yolo: Callable[..., Path]
) -> None:
    root = make_yolo({"train": ["0 0.5 0.5 0.25 0.5\n"]})
    random = np.random.default_rng(0)
    folder = root / "images/train"
    for name, shape in (("c.jpg", (96, 128, 3)), ("g.png", (64, 64)), ("o.png", (65, 130, 3)), ("g.jpg", (80, 48))):
        cv2.imwrite(str(folder / name), random.integers(0, 256, shape, np.uint8))
    _add_orientation(folder / "c.jpg", folder / "turned.jpg", 6)
    index = open_whole_set(str(root)).splits["train"]
    pack = _pack({"train": index}, tmp_path / "set.pack", decoded=True, imgsz=imgsz)
    found = pack.index("train")
    assert pack.decoded
    assert _equal(found, index, skip=("orientation",))
    assert np.array_equal(found.orientation, np.ones(len(index)))
    assert index.orientation.tolist().count(6) == 1
    sides = []
    for row in range(len(index)):
        pixels, reduced = _raw_pixels(store_of(found).read(row))
        sides.append(max(pixels.shape[:2]))
        expected = decode_compact(index.path(row), int(index.orientation[row]), reduced)
        assert np.array_equal(pixels, expected), index.paths[row]
        assert not imgsz or reduced == 1 or max(pixels.shape[:2]) >= imgsz
    grey = [index.paths[row] for row in range(len(index)) if _raw_pixels(store_of(found).read(row))[0].ndim == 2]
    assert {Path(name).name for name in grey} >= {"g.png", "g.jpg"}
    by_name = dict(zip((Path(name).name for name in index.paths), sides, strict=True))
    wanted = {"c.jpg": 128, "turned.jpg": 128, "g.png": 64, "o.png": 130, "g.jpg": 80}
    if imgsz:  # o.png has an odd side, which nothing divides
        smaller = {"c.jpg": imgsz, "turned.jpg": imgsz, "g.png": imgsz, "g.jpg": 40 if imgsz == 32 else 80}
        wanted |= smaller
    assert {name: by_name[name] for name in wanted} == wanted


def _raw_pixels(content: bytes) -> tuple[np.ndarray, int]:
    from paceline.data.raw import from_raw

    return from_raw(content)


def _add_orientation(source: Path, target: Path, orientation: int) -> None:
    """Write a JPEG again with an EXIF segment."""
    content = source.read_bytes()
    tiff = b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 274, 3, 1, orientation, 0) + bytes(4)
    body = b"Exif\0\0" + tiff
    target.write_bytes(content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:])


def test_options_that_contradict_each_other(data: dict[str, Index], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="add --decoded"):
        _pack(data, tmp_path / "set.pack", imgsz=64)
    small = _pack(data, tmp_path / "small.pack", decoded=True, imgsz=32)
    splits = {split: small.index(split) for split in small.splits}
    with pytest.raises(UserError, match="add --decoded"):
        _pack(splits, tmp_path / "set.pack")
    with pytest.raises(UserError, match="reduced for imgsz=32"):
        _pack(splits, tmp_path / "set.pack", decoded=True)
    _pack(splits, tmp_path / "set.pack", decoded=True, imgsz=32)
    assert (tmp_path / "set.pack").read_bytes() == (tmp_path / "small.pack").read_bytes()


def test_images_that_are_gone_or_broken_are_listed_and_nothing_is_written(
    data: dict[str, Index], tmp_path: Path
) -> None:
    (tmp_path / "set.pack").write_bytes(b"earlier")
    data["train"].path(1).unlink()
    data["train"].path(3).write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of 5 images cannot be packed(?s:.*)01\.jpg(?s:.*)03\.jpg") as caught:
        _pack(data, tmp_path / "set.pack")
    assert "No such file" in str(caught.value)
    assert (tmp_path / "set.pack").read_bytes() == b"earlier"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_full_disk_is_one_sentence(data: dict[str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        def write(self, content: Any, /) -> int:
            if self.tell() + len(content) > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(writer.os, "fdopen", lambda descriptor, mode: Full(descriptor, mode))
    with pytest.raises(UserError, match=r"Cannot write .*set\.pack: No space left on device; free some space"):
        _pack(data, tmp_path / "set.pack")
    assert [path.name for path in tmp_path.iterdir() if "pack" in path.name] == []


def test_a_place_that_cannot_be_written_is_one_sentence(data: dict[str, Index], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        _pack(data, tmp_path / "file/set.pack")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="Cannot write"):
        _pack(data, tmp_path / "folder")


def test_progress_counts_every_image(data: dict[str, Index], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_pack(
        data,
        tmp_path / "set.pack",
        made_from="YOLO",
        config=PackConfig(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(number, 5) for number in range(1, 6)]


def _read_all(path: Path) -> list[bytes]:
    """Open a pack and read all that is in it."""
    pack = Pack.open(path)
    contents = []
    for split in pack.splits:
        index = pack.index(split)
        contents += [store_of(index).read(row) for row in range(len(index))]
    return contents


def test_every_flipped_bit_is_noticed(data: dict[str, Index], tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    _pack(data, path)
    whole, good = path.read_bytes(), _read_all(path)
    random = np.random.default_rng(0)
    tables = Header.decode(whole[: HEADER.itemsize]).tables_start
    places = {*range(HEADER.itemsize), *random.integers(HEADER.itemsize, tables, 150).tolist()}
    places |= {*random.integers(tables, len(whole), 300).tolist(), len(whole) - 1}
    unnoticed = []
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            if _read_all(path) != good:
                unnoticed.append(place)
        except (UserError, BadImage):
            pass
        else:
            assert whole[place] == 0, f"only padding may change without a word, not byte {place}"
    assert unnoticed == []


def test_every_cut_is_noticed_when_it_is_opened(data: dict[str, Index], tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    _pack(data, path)
    whole = path.read_bytes()
    for length in [*range(70), *range(70, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="make it anew"):
            Pack.open(path)
    path.write_bytes(whole + b"x")
    with pytest.raises(UserError, match="bytes where"):
        Pack.open(path)


def test_a_damaged_image_is_a_bad_image_and_the_others_are_not(data: dict[str, Index], tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    pack = _pack(data, path)
    start = int(pack._entries["starts"][2])
    content = bytearray(path.read_bytes())
    content[start + 20] ^= 1
    path.write_bytes(content)
    store = store_of(Pack.open(path).index("train"))
    for _ in range(2):
        with pytest.raises(BadImage, match="checksum"):
            store.read(2)
    assert all(store.read(row) for row in (0, 1, 3))


CUT = """
import os, sys
from pathlib import Path
from paceline.data.pack.reader import Pack
from paceline.data.pack.store import store_of
from paceline.errors import UserError

pack = Pack.open(Path(sys.argv[1]))
index = pack.index("train")
os.truncate(sys.argv[1], int(sys.argv[2]))
for _ in range(2):
    try:
        store_of(index).read(3)
    except UserError as error:
        print(error)
print(index.boxes.sum(), list(index.paths), index.polygons.points.sum(), pack.index("train").labels.sum())
"""


@pytest.mark.parametrize("length", [0, HEADER.itemsize + 10, 4096])
def test_a_file_that_is_cut_off_while_it_is_open_is_one_sentence(
    data: dict[str, Index], tmp_path: Path, length: int
) -> None:
    """No image's fault and no signal: labels and names stay at hand."""
    path = tmp_path / "set.pack"
    index = _pack(data, path).index("train")
    expected = f"{index.boxes.sum()} {list(index.paths)} {index.polygons.points.sum()} {index.labels.sum()}"
    size = path.stat().st_size
    done = subprocess.run([sys.executable, "-c", CUT, path, str(length)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    *said, labels = done.stdout.splitlines()
    words = f"was cut off or written over while it was in use ({length:,} bytes where there were {size:,}); copy or"
    assert len(said) == 2
    assert all(sentence.startswith(f"{path} {words}") for sentence in said)
    assert labels == expected


def test_a_file_that_grows_while_it_is_open_is_another(data: dict[str, Index], tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    store = store_of(_pack(data, path).index("train"))
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="written over while it was in use"):
        store.read(0)


def test_a_file_that_is_written_over_is_compared_again(data: dict[str, Index], tmp_path: Path) -> None:
    """Of the same size: only images that are others now are damaged, also those that were whole when first read."""
    path = tmp_path / "set.pack"
    pack = _pack(data, path)
    store = store_of(pack.index("train"))
    before = [store.read(row) for row in range(4)]
    content = bytearray(path.read_bytes())
    content[int(pack._entries["starts"][2]) + 20] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1_000_000_000))
    with pytest.raises(BadImage, match="checksum"):
        store.read(2)
    assert [store.read(row) for row in (0, 1, 3)] == [before[row] for row in (0, 1, 3)]
    os.utime(path, ns=(0, 0))  # touched alone
    assert store.read(0) == before[0]


def test_large_tables_are_mapped_from_a_copy(
    data: dict[str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a million images need not lie in the memory of each rank; both ways give the same index."""
    path = tmp_path / "set.pack"
    held = _pack(data, path).index("train")
    monkeypatch.setattr("paceline.data.pack.medium.MOST_HELD_BYTES", 0)
    mapped = Pack.open(path, tmp_path / "cache").index("train")
    areas = Path("/proc/self/maps")
    if areas.exists():
        assert str(path) not in areas.read_text()
        assert f"{tmp_path / 'cache'}/" in areas.read_text()
    assert list((tmp_path / "cache").iterdir()) == []  # a file without a name, which nothing has to remove
    assert mapped.digest() == held.digest()


@pytest.mark.parametrize("most_held_bytes", [0, 64 << 20])
def test_a_pack_that_is_cut_off_keeps_its_labels_until_an_image_is_read(
    data: dict[str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held_bytes: int
) -> None:
    """Had its tables been mapped, the first look at them would end this process by SIGBUS."""
    path = tmp_path / "set.pack"
    expected = _pack(data, path).index("train").digest()
    monkeypatch.setattr("paceline.data.pack.medium.MOST_HELD_BYTES", most_held_bytes)
    index = Pack.open(path, tmp_path / "cache").index("train")
    os.truncate(path, 64)
    assert index.digest() == expected
    with pytest.raises(UserError, match="was cut off or written over while it was in use"):
        store_of(index).read(0)


def test_large_tables_are_held_where_no_copy_can_be_made(
    data: dict[str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "set.pack"
    expected = _pack(data, path).index("train").digest()
    (tmp_path / "cache").touch()  # no folder
    monkeypatch.setattr("paceline.data.pack.medium.MOST_HELD_BYTES", 0)
    assert Pack.open(path, tmp_path / "cache").index("train").digest() == expected
    assert "cannot be copied into the cache folder" in caplog.text


@pytest.mark.parametrize("most_held_bytes", [0, 64 << 20])
def test_a_pack_that_is_cut_off_while_it_is_opened_is_named(
    data: dict[str, Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held_bytes: int
) -> None:
    path = tmp_path / "set.pack"
    _pack(data, path)
    monkeypatch.setattr("paceline.data.pack.medium.MOST_HELD_BYTES", most_held_bytes)
    head = LocalFile.head

    def cut(medium: LocalFile, length: int) -> bytes:
        content = head(medium, length)
        os.truncate(path, path.stat().st_size - 10)
        return content

    monkeypatch.setattr(LocalFile, "head", cut)
    with pytest.raises(UserError, match=r"set\.pack ends too early; make it anew"):
        Pack.open(path, tmp_path / "cache")


def test_a_newer_version_says_so(data: dict[str, Index], tmp_path: Path) -> None:
    path = tmp_path / "set.pack"
    _pack(data, path)
    content = bytearray(path.read_bytes())
    content[8:12] = struct.pack("<I", 7)
    path.write_bytes(content)
    with pytest.raises(UserError, match="version 7 of the format, and this Paceline reads version 1"):
        Pack.open(path)


def test_unknown_columns_are_passed_over_and_missing_ones_are_not(data: dict[str, Index], tmp_path: Path) -> None:
    _pack(data, tmp_path / "set.pack")
    content = (tmp_path / "set.pack").read_bytes()
    header = Header.decode(content)
    directory = Directory.decode(content[header.directory_start :])
    table = directory.splits["train"]
    more = dict(table.columns) | {"later": table.columns["boxes"]}
    fewer = {name: column for name, column in table.columns.items() if name != "crowd"}
    for columns, good in ((more, True), (fewer, False)):
        splits = dict(directory.splits) | {"train": _replaced(table, columns=columns)}
        _rewrite(tmp_path / "other.pack", content, header, _replaced(directory, splits=splits))
        if good:
            assert _equal(Pack.open(tmp_path / "other.pack").index("train"), data["train"])
        else:
            with pytest.raises(UserError, match="no column crowd"):
                Pack.open(tmp_path / "other.pack").index("train")


def test_tables_that_do_not_fit_each_other_are_refused(data: dict[str, Index], tmp_path: Path) -> None:
    _pack(data, tmp_path / "set.pack")
    content = (tmp_path / "set.pack").read_bytes()
    header = Header.decode(content)
    directory = Directory.decode(content[header.directory_start :])
    table = directory.splits["train"]
    for changes in ({"num_images": 3}, {"num_boxes": 9}):
        splits = dict(directory.splits) | {"train": _replaced(table, **changes)}
        _rewrite(tmp_path / "other.pack", content, header, _replaced(directory, splits=splits))
        with pytest.raises(UserError, match="does not fit"):
            Pack.open(tmp_path / "other.pack").index("train")
    _rewrite(tmp_path / "other.pack", content, header, _replaced(directory, names=("cat",)))
    with pytest.raises(UserError, match="column labels"):
        Pack.open(tmp_path / "other.pack").index("train")


@pytest.mark.parametrize("shape", [(-1, -4), (2**32, 2**32), (0, -1), (2**70,)])
def test_shapes_that_no_array_has_are_refused(data: dict[str, Index], tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Products that come out right by their signs, or because 64 bits do not hold them."""
    _pack(data, tmp_path / "set.pack")
    content = (tmp_path / "set.pack").read_bytes()
    header = Header.decode(content)
    directory = Directory.decode(content[header.directory_start :])
    table = directory.splits["train"]
    place = table.columns["boxes"]
    size = max(math.prod(shape), 0) % 2**64 * 8 % 2**64
    checksum = zlib.crc32(content[place.start : place.start + size])
    columns = dict(table.columns) | {"boxes": _replaced(place, shape=shape, checksum=checksum)}
    splits = dict(directory.splits) | {"train": _replaced(table, columns=columns)}
    _rewrite(tmp_path / "other.pack", content, header, _replaced(directory, splits=splits))
    with pytest.raises(UserError, match="has a damaged"):
        Pack.open(tmp_path / "other.pack").index("train")


@pytest.mark.parametrize("content", [b'{"imgsz": Infinity}', b"[" * 200_000, b"{}", b"[]", b'"'])
def test_directories_that_are_none_are_damaged(data: dict[str, Index], tmp_path: Path, content: bytes) -> None:
    _pack(data, tmp_path / "set.pack")
    plain = (tmp_path / "set.pack").read_bytes()
    found = json.loads(plain[Header.decode(plain).directory_start :])
    if content.startswith(b'{"imgsz"'):
        content = json.dumps(found | {"imgsz": float("inf")}).encode()
    with pytest.raises(TornPackError, match="damaged directory"):
        Directory.decode(content)


@pytest.mark.parametrize(("column", "value"), [("starts", 2**63), ("starts", 0), ("lengths", 2**63)])
def test_entries_that_lead_out_of_the_images_are_refused(
    data: dict[str, Index], tmp_path: Path, column: str, value: int
) -> None:
    _pack(data, tmp_path / "set.pack")
    content = bytearray((tmp_path / "set.pack").read_bytes())
    header = Header.decode(bytes(content))
    directory = Directory.decode(bytes(content[header.directory_start :]))
    place = directory.entries[column]
    content[place.start : place.start + 8] = struct.pack("<Q", value)
    checksum = zlib.crc32(content[place.start : place.start + place.num_bytes])
    entries = dict(directory.entries) | {column: _replaced(place, checksum=checksum)}
    _rewrite(tmp_path / "set.pack", bytes(content), header, _replaced(directory, entries=entries))
    with pytest.raises(UserError, match=f"column {column} that does not fit"):
        Pack.open(tmp_path / "set.pack")


def _replaced(value: Any, **changes: Any) -> Any:
    return dataclasses.replace(value, **changes)


def _rewrite(path: Path, content: bytes, header: Header, directory: Directory) -> None:
    """Write a pack with another directory."""
    text = directory.encode()
    changed = _replaced(
        header,
        directory_bytes=len(text),
        directory_checksum=zlib.crc32(text),
        file_bytes=header.directory_start + len(text),
    )
    path.write_bytes(changed.encode() + content[HEADER.itemsize : header.directory_start] + text)


def test_the_header_is_as_documented() -> None:
    header = Header(file_bytes=1, tables_start=2, directory_start=3, directory_bytes=4, directory_checksum=5)
    content = header.encode()
    assert HEADER.itemsize == len(content) == 64
    assert content.startswith(MAGIC + struct.pack("<I", 1))
    assert Header.decode(content) == header
    with pytest.raises(TornPackError):
        Header.decode(content[:20])


def test_the_documents_list_every_column() -> None:
    page = Path(__file__).resolve().parents[3] / "docs/packs.md"
    text = page.read_text(encoding="utf-8")
    assert [name for name in (*COLUMNS, *(HEADER.names or ())) if f"`{name}`" not in text] == []


@pytest.mark.parametrize("missing", [True, False])
def test_what_cannot_be_opened_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: bool) -> None:
    """And nothing is printed beside it, as for an exception that nobody can catch."""
    unraisable: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    path = tmp_path / "some.pack"
    if not missing:
        path.write_bytes(b"no pack")
    with pytest.raises(UserError, match=r"some\.pack"):
        Pack.open(path)
    gc.collect()
    assert unraisable == []
