"""What the header of an image lets pass, the decoder decodes; what it refuses, no decoder here takes rightly."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pytest
from PIL import Image

from paceline.data.check import check_data
from paceline.data.config import DataConfig
from paceline.data.decode import decode_compact
from paceline.data.headers import UNDECODABLE, BadImage, read_header
from paceline.data.skim import skim_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

_HEIGHT, _WIDTH = 17, 24
_FAX = (2, 3, 4, 32771)
_PALETTE = 3


def _tiff(
    bits: int | tuple[int, ...],
    samples: int = 1,
    photometric: int | None = 1,
    *,
    compression: int = 1,
    planar: int = 1,
    sample_format: int = 0,
    order: str = "<",
) -> bytes:
    """Write a TIFF of one strip per plane, every pixel 0, little-endian by `order` `<`."""
    depths = bits if isinstance(bits, tuple) else (bits,) * samples
    num_planes, per_pixel = (samples, depths[0]) if planar == 2 else (1, sum(depths))
    strip = bytes((_WIDTH * per_pixel + 7) // 8 * _HEIGHT)
    strips = [8 + number * len(strip) for number in range(num_planes)]
    tags = {
        256: (4, [_WIDTH]),
        257: (4, [_HEIGHT]),
        258: (3, list(depths)),
        259: (3, [compression]),
        262: (3, [photometric]),
        273: (4, strips),
        277: (3, [samples]),
        278: (4, [_HEIGHT]),
        279: (4, [len(strip)] * num_planes),
        284: (3, [planar]),
        320: (3, [0] * (3 << min(depths[0], 16))),
        339: (3, [sample_format] * samples),
        530: (3, [1, 1]),  # chroma is not subsampled
    }
    unused = {320: photometric != _PALETTE, 339: not sample_format, 262: photometric is None, 530: photometric != 6}
    body, fields = b"".join([strip] * num_planes), b""
    kept = {tag: entry for tag, entry in tags.items() if not unused.get(tag)}
    for tag, (kind, values) in kept.items():
        raw = b"".join(struct.pack(order + ("H" if kind == 3 else "I"), value) for value in values)
        if len(raw) > 4:
            body += bytes(len(body) % 2)
            raw, place = struct.pack(order + "I", 8 + len(body)), raw
            body += place
        fields += struct.pack(order + "HHI", tag, kind, len(values)) + raw.ljust(4, b"\0")
    body += bytes(len(body) % 2)
    start = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(kept)) + fields + bytes(4)
    return start + struct.pack(order + "I", 8 + len(body)) + body + directory


def _tiffs() -> Iterator[tuple[str, bytes]]:
    for bits, samples, photometric, planar in itertools.product(
        (1, 2, 4, 6, 8, 10, 12, 14, 16, 32), (1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6, 8, 9, 32803), (1, 2)
    ):
        enough = {2: 3, 5: 4, 6: 3, 8: 3, 9: 3}.get(photometric, 1)
        interleaved = photometric in (_PALETTE, 8) or samples == 1  # planes of these make no sense
        if samples >= enough and not (planar == 2 and interleaved):
            yield (
                f"{bits} bits, {samples} samples, kind {photometric}, planar {planar}",
                _tiff(bits, samples, photometric, planar=planar),
            )
    for bits, sample_format in itertools.product((8, 16, 32, 64), (1, 2, 3, 4, 5, 6)):
        yield f"{bits} bits, format {sample_format}", _tiff(bits, sample_format=sample_format)
    for mixed in ((5, 6, 5), (8, 8, 16), (16, 16, 8)):
        yield f"{mixed} bits", _tiff(mixed, 3, 2)
    for order, bits in itertools.product("<>", (1, 8, 12, 16)):
        yield f"{bits} bits, order {order}", _tiff(bits, order=order)
    for compression in _FAX:
        yield f"fax {compression}", _tiff(1, compression=compression)
        yield f"fax {compression} of 8 bits", _tiff(8, compression=compression)
    yield "no kind", _tiff(8, photometric=None)


def _png(bits: int, colours: int, *, interlace: int = 0, compression: int = 0, chunks: str = "PLTE IDAT") -> bytes:
    samples = {2: 3, 4: 2, 6: 4}.get(colours, 1)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    steps = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    passes = [(-(-(_WIDTH - x) // dx), -(-(_HEIGHT - y) // dy)) for x, y, dx, dy in steps]
    sides = passes if interlace else [(_WIDTH, _HEIGHT)]
    rows = b"".join(bytes((1 + (width * samples * bits + 7) // 8) * height) for width, height in sides)
    contents = {"PLTE": bytes(3 << min(bits, 8)), "IDAT": zlib.compress(rows)}
    header = struct.pack(">IIBBBBB", _WIDTH, _HEIGHT, bits, colours, compression, 0, interlace)
    used = [name for name in chunks.split() if name != "PLTE" or colours == 3]
    middle = b"".join(chunk(name.encode(), contents[name]) for name in used)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IEND", b"")


def _pngs() -> Iterator[tuple[str, bytes]]:
    for bits, colours, interlace in itertools.product((0, 1, 2, 3, 4, 8, 16, 32), range(8), (0, 1, 2)):
        yield f"{bits} bits, colours {colours}, interlace {interlace}", _png(bits, colours, interlace=interlace)
    yield "other compression", _png(8, 2, compression=1)
    yield "no palette", _png(8, 3, chunks="IDAT")
    yield "late palette", _png(8, 3, chunks="IDAT PLTE")
    yield "no pixels", _png(8, 2, chunks="")


def _bmp(bits: int, header_bytes: int = 40, *, compression: int = 0, masks: tuple[int, ...] = ()) -> bytes:
    core = header_bytes == 12
    pixels = bytes((_WIDTH * bits + 31) // 32 * 4 * _HEIGHT)
    if compression in (1, 2):
        pixels = bytes((_WIDTH, 5, 0, 0)) * _HEIGHT + b"\0\1"
    palette = bytes((3 if core else 4) << bits) if bits <= 8 else b""
    mask = b"".join(struct.pack("<I", value) for value in masks)
    if core:
        info = struct.pack("<IHHHH", 12, _WIDTH, _HEIGHT, 1, bits)
    else:
        numbers = (header_bytes, _WIDTH, _HEIGHT, 1, bits, compression, len(pixels), 2835, 2835, 0, 0)
        info = struct.pack("<IiiHHIIiiII", *numbers) + mask
        info = info.ljust(header_bytes, b"\0")
    start = 14 + len(info) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + info + palette + pixels


def _bmps() -> Iterator[tuple[str, bytes]]:
    for bits, header_bytes in itertools.product((0, 1, 2, 4, 8, 16, 24, 32, 64), (12, 16, 40, 52, 56, 64, 108, 124)):
        yield f"{bits} bits, header {header_bytes}", _bmp(bits, header_bytes)
    for (bits, masks), header_bytes in itertools.product(
        ((16, (0xF800, 0x7E0, 0x1F)), (16, (0x7C00, 0x3E0, 0x1F)), (32, (0xFF0000, 0xFF00, 0xFF))), (40, 56, 108, 124)
    ):
        yield (
            f"masks of {bits} bits, {masks[0]:x}, {header_bytes}",
            _bmp(bits, header_bytes, compression=3, masks=masks),
        )
        yield (
            f"masks with alpha of {bits} bits, {masks[0]:x}, {header_bytes}",
            _bmp(bits, header_bytes, compression=6, masks=(*masks, 0)),
        )
    for bits, compression in itertools.product((1, 4, 8, 16, 24, 32), (1, 2, 4, 5, 11)):
        yield f"{bits} bits, compression {compression}", _bmp(bits, compression=compression)


def _jpegs() -> Iterator[tuple[str, bytes]]:
    for mode, options in (("L", {}), ("RGB", {}), ("CMYK", {}), ("RGB", {"progressive": True})):
        stream = io.BytesIO()
        Image.new(mode, (_WIDTH, _HEIGHT)).save(stream, "JPEG", **options)
        yield f"{mode} {options}", stream.getvalue()
    encoded = cv2.imencode(".jpg", np.zeros((_HEIGHT, _WIDTH, 3), np.uint8))[1].tobytes()
    size = encoded.index(b"\xff\xc0")
    for offset, value in ((1, 0xC5), (1, 0xC6), (1, 0xC7), (1, 0xCB), (1, 0xCD), (1, 0xCE), (1, 0xCF), (4, 12), (9, 2)):
        changed = bytearray(encoded)
        changed[size + offset] = value
        yield f"byte {offset} of the frame is {value:x}", bytes(changed)


_ALL = {"tiff": _tiffs, "png": _pngs, "bmp": _bmps, "jpeg": _jpegs}


@pytest.mark.parametrize("kind", sorted(_ALL))
def test_header_and_decoder_agree(tmp_path: Path, kind: str) -> None:
    """On every kind of file, with the native library and without it."""
    path = tmp_path / "image"
    passed, refused, wrong = list[str](), list[str](), list[str]()
    for name, content in _ALL[kind]():
        path.write_bytes(content)
        try:
            shape = decode_compact(path).shape[:2]
        except BadImage:
            shape = ()
        try:
            header = read_header(path)
        except BadImage:
            size, is_same = (), not skim_heads([str(path)]).marks[0]
            refused.append(name)
        else:
            heads = skim_heads([str(path)])
            size, is_same = (header.height, header.width), not heads.marks[0] or heads.header(0) == header
            passed.append(name)
        if size != shape or not is_same:
            wrong.append(f"{name}: header {size}, decoder {shape}, native the same: {is_same}")
    assert not wrong
    assert len(passed) >= 4
    assert len(refused) >= 4


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
@pytest.mark.parametrize("samples", [1, 3])
def test_scan_says_so_at_once(tmp_path: Path, make_yolo: Callable[..., Path], bits: int, samples: int) -> None:
    line = "0 0.5 0.5 0.25 0.5\n"
    root = make_yolo({"train": [line] * 20, "val": [line]})
    (root / "images/train/03.jpg").write_bytes(_tiff(bits, samples, 2 if samples == 3 else 1))
    report = check_data(DataConfig(data=str(root)))
    assert report.report.counts == {"image": 1}
    assert report.report.num_images == 21
    assert f"images/train/03.jpg: {UNDECODABLE}: a TIFF of {bits}-bit samples; convert it to 8" in report.format_text()


@pytest.mark.parametrize("compression", [6, 34712, 34892, 34925, 34934, 50000, 50001, 50002, 9999])
def test_compressions_that_would_come_out_as_noise_are_refused(tmp_path: Path, compression: int) -> None:
    """OpenCV gives an image for some of them all the same, of zeros or of whatever was in memory."""
    (tmp_path / "a.tif").write_bytes(_tiff(8, 3, 2, compression=compression))
    with pytest.raises(BadImage, match=f"{UNDECODABLE}: a TIFF of compression {compression}; convert"):
        read_header(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "tiff_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "P"])
def test_compressions_that_are_decoded_pass(tmp_path: Path, compression: str | None, mode: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (_HEIGHT, _WIDTH, 3), np.uint8)
    picture = Image.fromarray(cv2.GaussianBlur(noise, (0, 0), 4))
    if mode == "LAB":
        picture = Image.fromarray(np.asarray(picture)[..., 0]).convert("RGB")
        picture = Image.merge("LAB", picture.split())
    path = tmp_path / "a.tif"
    try:
        picture.convert(mode).save(path, compression=compression)
    except (OSError, ValueError, RuntimeError):
        pytest.skip(f"Pillow does not write {mode} under {compression}")
    header = read_header(path)
    assert (header.height, header.width) == decode_compact(path).shape[:2]
    if mode in ("L", "RGB"):
        expected = np.asarray(picture.convert(mode), np.int64)
        assert np.abs(decode_compact(path).astype(np.int64) - expected).mean() < (4 if compression == "jpeg" else 0.01)


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"save_all": True}, {"exif": b"Exif\0\0II*\0"}])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_every_webp_is_decoded(tmp_path: Path, options: dict[str, object], mode: str) -> None:
    frames = [Image.new(mode, (_WIDTH, _HEIGHT), colour) for colour in ("red", "blue")]
    others = {"append_images": frames[1:]} if "save_all" in options else {}
    frames[0].save(tmp_path / "a.webp", **options, **others)
    header = read_header(tmp_path / "a.webp")
    assert (header.height, header.width) == decode_compact(tmp_path / "a.webp").shape[:2] == (_HEIGHT, _WIDTH)
