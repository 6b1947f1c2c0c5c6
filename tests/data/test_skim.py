"""What the native library reads is what the readers in Python read, to the last bit; the rest it sets aside."""

from __future__ import annotations

import io
import os
import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from paceline.data import skim
from paceline.data.formats.yolo import YoloLabels, YoloSource
from paceline.data.headers import Header, read_header
from paceline.data.skim import IMAGE_FORMATS, skim_heads, skim_labels
from paceline.native.readers import readers

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.data.scan import Scan

needs_library = pytest.mark.skipif(readers() is None, reason="the native library was not built")

_HEADER = Header(height=40, width=60, orientation=1, format="jpeg")
_ENDS = st.sampled_from(["\n", "\r\n"])
_SHARES = st.one_of(
    st.floats(0, 1).map(repr),
    st.floats(0, 1).map("{:.6f}".format),
    st.floats().map(repr),
    st.from_regex(r"[+-]?[0-9]{0,22}\.?[0-9]{0,25}([eE][+-]?[0-9]{1,3})?", fullmatch=True),
)
_WORDS = st.one_of(
    _SHARES, st.sampled_from(["0", "1", "-1", "79", "0.0", "1e0", "1_0", "nan", "inf", "0x1p3", "cat", "١"])
)
_GOOD_LINE = st.tuples(st.integers(0, 1), *[st.floats(0.25, 0.5)] * 4).map(lambda row: " ".join(map(repr, row)))
_LINES = st.one_of(
    _GOOD_LINE, st.lists(_WORDS, max_size=8).map(" ".join), st.lists(_WORDS, min_size=5, max_size=5).map("\t".join)
)
_GAPS = st.sampled_from(["", " ", "\t ", "\n", "\r", "\v", "\x1c", "\x85", "\0", "\u2028", "\ufeff"])


def _write(folder: Path, contents: list[bytes], suffix: str) -> list[str]:
    paths = [folder / f"{number}{suffix}" for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return [str(path) for path in paths]


def _bits(values: object) -> bytes:
    return np.array(values, np.float64).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("skim")


@needs_library
@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_ENDS, st.lists(st.tuples(_GAPS, _LINES, _GAPS), max_size=4)), max_size=4))
def test_labels_are_those_of_the_reader_or_set_aside(
    folder: Path, files: list[tuple[str, list[tuple[str, str, str]]]]
) -> None:
    contents = [end.join("".join(parts) for parts in lines).encode() for end, lines in files]
    got = skim_labels(_write(folder, contents, ".txt"))
    assert np.all(np.diff(got.files) >= 0)
    for number, content in enumerate(contents):
        rows = got.files == number
        if not got.plain[number]:
            assert not rows.any()
            continue
        expected = YoloLabels().read(content, _HEADER)
        assert not expected.problems
        assert got.labels[rows].tolist() == expected.labels
        assert got.lines[rows].tolist() == expected.lines
        assert got.quads[rows].tobytes() == _bits(expected.quads)


@needs_library
@settings(max_examples=300, deadline=None)
@given(_SHARES)
@example("0.500000000000000166533453693773481063544750213623046875")
@example("9007199254740993")
@example("4.9e-324")
@example("-0.0")
@example("0.0000000000000000000000000000001")
def test_numbers_are_rounded_as_python_does(folder: Path, text: str) -> None:
    got = skim_labels(_write(folder, [f"3 {text} 0.5 0.25 {text}\n".encode()], ".txt"))
    try:
        value = float(text)
    except ValueError:
        assert not got.plain.any()
        return
    if got.plain[0]:
        assert got.quads.tobytes() == _bits([value, 0.5, 0.25, value])
    else:  # huge or tiny exponents, long tails of digits, words for numbers
        assert not 1e-300 < abs(value) < 1e300 or len(text) > 60


@needs_library
@pytest.mark.parametrize("number", [0, 1, 3, 600])
def test_plain_files_are_not_set_aside(folder: Path, number: int) -> None:
    random = np.random.default_rng(number)
    forms = ("{:.6f}", "{:.3g}", "{!r}", "{:.17g}", "{:e}")
    lines = [
        " ".join([str(random.integers(80)), *(forms[k % 5].format(float(value)) for value in random.random(4))])
        for k in range(number)
    ]
    contents = [end.join(lines).encode(code) + tail for end in ("\n", "\r\n") for code in ("utf-8", "utf-8-sig")
                for tail in (b"", b"\n", b" \n\n", b"\t")]  # fmt: skip
    got = skim_labels(_write(folder, contents, ".txt"))
    assert got.plain.all()
    assert np.array_equal(got.files, np.repeat(np.arange(len(contents)), number))
    assert got.quads.tobytes() == _bits([[float(word) for word in line.split()[1:]] for line in lines] * len(contents))


@needs_library
def test_files_beyond_one_call_and_too_long_ones(folder: Path) -> None:
    line = b"0 0 0 0 0\n"
    contents = [line * 6000, line * 6000, b"", line * 7000, line * 6500]  # of 64 KiB and more is the fourth
    got = skim_labels(_write(folder, contents, ".txt"))
    assert got.plain.tolist() == [True, True, True, False, True]
    assert np.bincount(got.files, minlength=5).tolist() == [6000, 6000, 0, 0, 6500]
    assert got.lines[-6500:].tolist() == list(range(1, 6501))


@needs_library
def test_what_cannot_be_opened_is_set_aside(folder: Path) -> None:
    fifo = folder / "fifo"
    if not fifo.exists():
        os.mkfifo(fifo)
    paths = [str(folder / "none"), str(folder), *_write(folder, [b"0 1 1 1 1"], ".txt")]
    assert skim_labels(paths).plain.tolist() == [False, False, True]
    assert skim_heads([*paths, str(fifo)]).marks.tolist() == [0, 0, 0, 0]
    assert not len(skim_heads([]).marks)
    assert not len(skim_labels([]).plain)


def _encoded(form: str, height: int, width: int, **options: object) -> bytes:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, form, **options)
    return stream.getvalue()


def _exif(orientation: int, *, big: bool, pages: int = 0) -> bytes:
    order = ">" if big else "<"
    tags = [(271, 2, 3, b"ab\0\0"), (274, 3, 1, struct.pack(f"{order}HH", orientation, 0)), (282, 3, 1, b"\0\1\0\0")]
    entries = b"".join(struct.pack(f"{order}HHI", *tag[:3]) + tag[3] for tag in tags)
    head = (b"MM" if big else b"II") + struct.pack(f"{order}HI", 42, 8)
    return head + struct.pack(f"{order}H", len(tags)) + entries + bytes(4 + 4096 * pages)


def _same(paths: list[str]) -> list[str]:
    """Check that heads are those of the reader; return the format of each, empty where it was set aside."""
    heads = skim_heads(paths)
    for number, path in enumerate(paths):
        if heads.marks[number]:
            assert heads.header(number) == read_header(path)
    return [IMAGE_FORMATS[mark] for mark in heads.marks]


@needs_library
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("orientation", [0, 1, 3, 6, 8, 9])
def test_ordinary_images_are_not_set_aside(folder: Path, orientation: int, big: bool) -> None:
    exif = _exif(orientation, big=big)
    contents = [
        _encoded("JPEG", 30, 50, quality=60),
        _encoded("JPEG", 130, 150, quality=100),
        _encoded("JPEG", 130, 150, progressive=True),
        _encoded("JPEG", 30, 50, exif=exif),
        _encoded("JPEG", 130, 150, exif=_exif(orientation, big=big, pages=8)),
        _encoded("JPEG", 30, 50, icc_profile=b"x" * 100_000),
        _encoded("PNG", 30, 50),
        _encoded("PNG", 130, 150),
        _encoded("PNG", 30, 50, exif=exif),
    ]
    assert _same(_write(folder, contents, ".img")) == ["jpeg"] * 6 + ["png"] * 3


@needs_library
@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["JPEG", "PNG", "BMP", "WEBP"]),
    st.booleans(),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.booleans(),
)
def test_damaged_images_are_judged_alike(
    folder: Path, form: str, exif: bool, changes: list[tuple[float, int]], share: float, early: bool
) -> None:
    options = {"exif": _exif(6, big=True)} if exif and form in {"JPEG", "PNG"} else {}
    content = bytearray(_encoded(form, 40, 60, **options))
    reach = min(len(content), 200) if early else len(content)
    for place, value in changes:
        content[int(place * (reach - 1))] = value
    (path,) = _write(folder, [bytes(content[: int(share * len(content))])], ".img")
    (form,) = _same([path])
    if form:
        assert read_header(path).format == form


def _scan(root: Path) -> Scan:
    source = YoloSource.open(root / "data.yaml")
    return source.scan("train", source.list_files("train"))


@needs_library
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["whole", "whole", "whole", "cut", "page", "none"]),
            st.one_of(st.none(), st.lists(_LINES, max_size=5), st.lists(_GOOD_LINE, max_size=5), st.just(["\0"])),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_scan_is_the_same_without_the_library(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, list[str] | None]]
) -> None:
    root = tmp_path_factory.mktemp("set")
    (root / "images").mkdir()
    (root / "labels").mkdir()
    (root / "data.yaml").write_text("train: images\nnames: [cat, dog]\n")
    for number, (state, lines) in enumerate(entries):
        content = _encoded("JPEG" if number % 2 else "PNG", 40, 60 + number)
        content = {"whole": content, "none": b"", "cut": content[: len(content) // 2], "page": b"<html>"}[state]
        (root / "images" / f"{number}.jpg").write_bytes(content)
        if lines is not None:
            (root / "labels" / f"{number}.txt").write_text("\n".join(lines))
    fast = _scan(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skim, "readers", lambda: None)
        slow = _scan(root)
    assert fast.report == slow.report
    assert list(fast.index.paths) == list(slow.index.paths)
    for name in ("sizes", "orientation", "offsets", "boxes", "labels", "crowd", "difficult", "area"):
        assert getattr(fast.index, name).tobytes() == getattr(slow.index, name).tobytes(), name
