"""An index survives the way to disk and back, and damage to its file is noticed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data import index as index_module
from paceline.data.index import Index, Strings, TornIndexError
from paceline.data.polygons import Polygons

if TYPE_CHECKING:
    from numpy.typing import NDArray

_FIELDS = ("sizes", "orientation", "offsets", "boxes", "labels", "crowd", "difficult", "area", "image_ids", "origins")


def _index(counts: list[int], seed: int = 0) -> Index:
    random, total = np.random.default_rng(seed), sum(counts)
    return Index(
        names=("cat", "schöner Hund"),
        root=Path("/somewhere"),
        paths=Strings.of(f"images/ü {k}.jpg" for k in range(len(counts))),
        sizes=random.integers(1, 100, (len(counts), 2), np.int32),
        orientation=random.integers(1, 9, len(counts)).astype(np.uint8),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=random.uniform(0, 100, (total, 4)),
        labels=random.integers(0, 2, total, np.int32),
        crowd=random.random(total) < 0.2,
        difficult=random.random(total) < 0.2,
        area=random.uniform(0, 100, total),
        image_ids=random.integers(0, 1000, len(counts)),
        category_ids=np.array([3, 7]),
        origins=random.permutation(len(counts)),
        polygons=_outlines(total, random),
    )


def _outlines(number: int, random: np.random.Generator) -> Polygons:
    """Between no ring and three for each box, of three points or more; for some seeds no table at all."""
    if random.random() < 0.2:
        return Polygons.none()
    return Polygons.of(
        [random.uniform(0, 100, (random.integers(3, 9), 2)) for _ in range(random.integers(0, 4))]
        for _ in range(number)
    )


def _same_outlines(first: list[NDArray[np.float32]], second: list[NDArray[np.float32]]) -> bool:
    return len(first) == len(second) and all(np.array_equal(*pair) for pair in zip(first, second, strict=True))


def _equal(first: Index, second: Index) -> bool:
    arrays = all(np.array_equal(getattr(first, name), getattr(second, name)) for name in (*_FIELDS, "category_ids"))
    outlines = all(
        _same_outlines(first.polygons.outline(box), second.polygons.outline(box)) for box in range(len(first.boxes))
    )
    return arrays and outlines and list(first.paths) == list(second.paths) and first.names == second.names


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_strings_come_back(texts: list[str]) -> None:
    packed = Strings.of(texts)
    assert list(packed) == texts
    assert len(packed) == len(texts)


def test_strings_keep_names_that_are_no_utf8() -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    assert Strings.of([name])[0] == name


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=8))
def test_saved_index_comes_back(tmp_path_factory: pytest.TempPathFactory, counts: list[int]) -> None:
    file = tmp_path_factory.getbasetemp() / "index.safetensors"
    index = _index(counts)
    index.save(file, {"fingerprint": "abc"})
    loaded, notes = Index.load(file, index.root)
    assert _equal(index, loaded)
    assert notes == {"fingerprint": "abc"}


def test_file_is_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    index = _index([2, 0, 1])
    index.save(tmp_path / "i.safetensors")
    assert np.array_equal(load_file(tmp_path / "i.safetensors")["boxes"], index.boxes)


@pytest.mark.parametrize("is_large", [False, True])
def test_large_files_are_mapped_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_large: bool) -> None:
    file = tmp_path / "i.safetensors"
    _index([2, 3]).save(file)
    monkeypatch.setattr(index_module, "MOST_COPIED_BYTES", file.stat().st_size - is_large)
    loaded, _ = Index.load(file, tmp_path)
    assert isinstance(loaded.boxes, np.memmap) == is_large
    assert not loaded.boxes.flags.writeable


def test_a_file_that_is_cut_off_while_it_is_in_use_takes_nothing_along(tmp_path: Path) -> None:
    """In a process of its own, which a signal would end: several pages, of which none is there any more."""
    file = tmp_path / "i.safetensors"
    _index([40] * 500).save(file)
    assert file.stat().st_size > 1 << 19
    look = (
        "import os, sys; from pathlib import Path; from paceline.data.index import Index\n"
        "index, _ = Index.load(Path(sys.argv[1]), Path())\n"
        "os.truncate(sys.argv[1], 0)\n"
        "print(index.boxes.shape, index.boxes.sum() > 0, index.polygons.points.sum() > 0, len(list(index.paths)))"
    )
    done = subprocess.run([sys.executable, "-c", look, str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(20000,", "4)", "True", "True", "500"]


@settings(max_examples=40, deadline=None)
@given(share=st.floats(0, 0.999))
def test_cut_off_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, share: float) -> None:
    file = tmp_path_factory.getbasetemp() / "torn.safetensors"
    _index([2, 3]).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(TornIndexError):
        Index.load(file, Path())


@settings(max_examples=40, deadline=None)
@given(place=st.floats(0, 0.999), bit=st.integers(0, 7))
def test_flipped_bit_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: float, bit: int) -> None:
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    index = _index([2, 3])
    index.save(file, {"fingerprint": "abc"})
    content = bytearray(file.read_bytes())
    content[int(len(content) * place)] ^= 1 << bit
    file.write_bytes(content)
    try:
        loaded, notes = Index.load(file, Path())
    except TornIndexError:
        return
    assert _equal(index, loaded)  # a bit that only fills up the header
    assert notes == {"fingerprint": "abc"}


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.data())
def test_selected_images_keep_their_boxes(counts: list[int], data: st.DataObject) -> None:
    index = _index(counts)
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=10))
    chosen = index.select_images(np.array(rows, np.int64))
    assert len(chosen) == len(rows)
    for place, row in enumerate(rows):
        assert np.array_equal(chosen.boxes[chosen.slice(place)], index.boxes[index.slice(row)])
        assert np.array_equal(chosen.labels[chosen.slice(place)], index.labels[index.slice(row)])
        assert chosen.path(place) == index.path(row)
        assert chosen.origins[place] == index.origins[row]
        for mine, theirs in zip(
            range(*chosen.slice(place).indices(len(chosen.boxes))),
            range(*index.slice(row).indices(len(index.boxes))),
            strict=True,
        ):
            assert _same_outlines(chosen.polygons.outline(mine), index.polygons.outline(theirs))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=8), st.integers(0, 100))
def test_selected_boxes_stay_with_their_images(counts: list[int], seed: int) -> None:
    index = _index(counts)
    keep = np.random.default_rng(seed).random(sum(counts)) < 0.5
    chosen = index.select_boxes(keep)
    for row in range(len(index)):
        assert np.array_equal(chosen.boxes[chosen.slice(row)], index.boxes[index.slice(row)][keep[index.slice(row)]])
    for mine, theirs in enumerate(np.flatnonzero(keep).tolist()):
        assert _same_outlines(chosen.polygons.outline(mine), index.polygons.outline(theirs))
    assert np.array_equal(chosen.origins, index.origins)


def test_targets_are_neither_crowd_nor_difficult() -> None:
    index = _index([50])
    assert np.array_equal(index.targets, ~index.crowd & ~index.difficult)
    assert 0 < index.targets.sum() < 50


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5)), st.data())
def test_taken_strings_are_those_asked_for(texts: list[str], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(texts) - 1), max_size=10)) if texts else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_BLOCK", data.draw(st.integers(1, 4)))
        packed = Strings.of(texts)
        assert list(packed) == texts
        assert list(packed.take(np.array(rows, np.int64))) == [texts[row] for row in rows]


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs the kernel's account of mapped pages")
def test_loading_a_large_file_reads_everything_and_keeps_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_module, "MOST_COPIED_BYTES", 1 << 20)
    file = tmp_path / "large.safetensors"
    index = _index([200_000, 1])
    index.save(file)

    def resident_bytes() -> int:
        areas = Path("/proc/self/smaps").read_text().split(f"{file}\n")[1:]
        return sum(int(area.split("Rss:")[1].split()[0]) * 1024 for area in areas)

    loaded, _ = Index.load(file, index.root)
    assert resident_bytes() < file.stat().st_size / 10
    assert np.array_equal(loaded.boxes, index.boxes)
    assert resident_bytes() > loaded.boxes.nbytes / 2  # now it has been looked at
