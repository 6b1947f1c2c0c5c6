"""Headers: size and orientation of an image file, and whether the file is whole, without decoding its pixels."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff"})
"""Endings of file names, in lower case, that are taken for images; what a file is, its content decides."""

_HEAD_BYTES = 4096
_TAIL_BYTES = 64
_LONGEST_SIDE_PX = (1 << 31) - 1
"""As PNG has it, and what an index can hold."""
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_ORIENTATION_TAG = 274
_TIFF_BITS, _TIFF_SAMPLE_FORMAT = 258, 339
_MOST_TIFF_BITS = 16
_TIFF_FLOAT = 3

UNDECODABLE = "cannot be decoded"
"""How the reason of a BadImage begins where the file is there, whole by its header, and no decoder takes it."""


class BadImage(ValueError):  # noqa: N818
    """A file that is no whole image of a known type; the message says what it is, and how to mend it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an image file says of itself."""

    height: int
    """Pixels, after the rotation that `orientation` asks for."""
    width: int
    """Pixels, after the rotation that `orientation` asks for."""
    orientation: int
    """EXIF orientation, 1 to 8; 1 is upright."""
    format: str
    """`jpeg`, `png`, `bmp`, `webp` or `tiff`."""


class _File:
    """Random access to an open file whose first bytes were read at once."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.size = os.fstat(descriptor).st_size
        self.head = os.read(descriptor, _HEAD_BYTES)

    def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`; fewer where the file ends before."""
        if offset + length <= len(self.head):
            return self.head[offset : offset + length]
        return os.pread(self._descriptor, length, offset)

    def unpack(self, layout: struct.Struct, offset: int) -> tuple[int, ...]:
        """Read integers; raises BadImage where the file ends before."""
        data = self.read(offset, layout.size)
        if len(data) < layout.size:
            raise BadImage("is cut off; download or export it again")
        return layout.unpack(data)


def read_header(path: str | os.PathLike[str]) -> Header:
    """Read size and orientation of an image file.

    Raises BadImage for what is no image, or not a whole one.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise BadImage(f"cannot be opened ({error.strerror}); check the file and its permissions") from error
    try:
        file = _File(descriptor)
        for recognise, parse in _READERS:
            if recognise(file.head):
                height, width, orientation, kind = parse(file)
                break
        else:
            raise BadImage(_what_it_is(file))
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror}); check the file and its permissions") from error
    finally:
        os.close(descriptor)
    if not (1 <= height <= _LONGEST_SIDE_PX and 1 <= width <= _LONGEST_SIDE_PX):
        raise BadImage(f"says that it is {width} x {height} pixels; export it again")
    if orientation > 4:
        height, width = width, height
    return Header(height=height, width=width, orientation=orientation, format=kind)


def _what_it_is(file: _File) -> str:
    """Say in words what a file is that is no image of a known type."""
    if file.size == 0:
        return "is empty (0 bytes); download or export it again"
    head = file.head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--", b"<script")):
        return "is a web page, not an image; download it again"
    if file.head.startswith(b"GIF8"):
        return "is a GIF; convert it to PNG or JPEG"
    if file.head[4:8] == b"ftyp":
        return "is a HEIC, AVIF or video file; convert it to JPEG or PNG"
    if not file.head.strip(b"\0"):
        return "holds only zeros (a copy that was broken off?); copy it again"
    return "is no JPEG, PNG, BMP, WebP or TIFF image; convert it to one of these, or remove it"


_U16_U16_BIG = struct.Struct(">HH")
_MARKER = struct.Struct(">BBH")
_SIZE_JPEG = struct.Struct(">BHH")


def _read_jpeg(file: _File) -> tuple[int, int, int, str]:
    """JPEG: walk the segments up to the start of scan, then look for the end of image."""
    height = width = 0
    orientation = 1
    offset = 2
    while True:
        start, marker, length = file.unpack(_MARKER, offset)
        if start != 0xFF:
            raise BadImage("is a damaged JPEG (a marker is missing); export it again")
        if marker == 0xFF:  # a fill byte before the marker
            offset += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a segment
            offset += 2
            continue
        if marker == 0xD9:
            raise BadImage("is a JPEG without pixels; export it again")
        if marker in _JPEG_SIZE_MARKERS:
            _, height, width = file.unpack(_SIZE_JPEG, offset + 4)
        elif marker == 0xE1 and file.read(offset + 4, 6) == b"Exif\0\0":
            orientation = _orientation_of_exif(file.read(offset + 10, length - 8))
        offset += 2 + length
        if marker == 0xDA:
            break
    if not width:
        raise BadImage("is a JPEG that does not say its size; export it again")
    if not _ends_jpeg(file, offset):
        raise BadImage("is cut off (a JPEG without its end); download or export it again")
    return height, width, orientation, "jpeg"


def _ends_jpeg(file: _File, scan: int) -> bool:
    """Look for the end-of-image marker behind the start of the scan, where FF D9 can be nothing else."""
    near = max(scan, file.size - _TAIL_BYTES)
    if b"\xff\xd9" in file.read(near, file.size - near):
        return True
    return scan < near and b"\xff\xd9" in file.read(scan, file.size - scan)  # a long trailer, as phones write


_CHUNK_PNG = struct.Struct(">I4x")
_SIZE_PNG = struct.Struct(">II")


def _read_png(file: _File) -> tuple[int, int, int, str]:
    """PNG: size from IHDR, orientation from eXIf if it comes before the pixels; IEND must be there."""
    if file.read(12, 4) != b"IHDR":
        raise BadImage("is a damaged PNG (no IHDR chunk); export it again")
    width, height = file.unpack(_SIZE_PNG, 16)
    orientation = 1
    for kind, offset, length in _png_chunks(file, 33):
        if kind == b"IDAT":
            break
        if kind == b"eXIf":
            orientation = _orientation_of_exif(file.read(offset, length))
    if file.read(max(file.size - 8, 0), 4) != b"IEND" and all(kind != b"IEND" for kind, _, _ in _png_chunks(file, 33)):
        raise BadImage("is cut off (a PNG without its end); download or export it again")
    return height, width, orientation, "png"


def _png_chunks(file: _File, offset: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, offset of the content, length) of each chunk that is there."""
    while offset + 8 <= file.size:
        (length,) = file.unpack(_CHUNK_PNG, offset)
        yield file.read(offset + 4, 4), offset + 8, length
        offset += 12 + length


_SIZE_BMP = struct.Struct("<iiHHI")
_SIZE_BMP_CORE = struct.Struct("<HHHH")


def _read_bmp(file: _File) -> tuple[int, int, int, str]:
    """BMP: size from the information header; pixels must fit in the file where they are not compressed."""
    pixels, header_size = file.unpack(struct.Struct("<II"), 10)
    if header_size == 12:
        width, height, _, bits = file.unpack(_SIZE_BMP_CORE, 18)
        compression = 0
    else:
        width, height, _, bits, compression = file.unpack(_SIZE_BMP, 18)
    height = abs(height)  # negative means that rows come from the top
    if compression in (0, 3) and pixels + (width * bits + 31) // 32 * 4 * height > file.size:
        raise BadImage("is cut off (a BMP with fewer pixels than it says); download or export it again")
    return height, width, 1, "bmp"


_CHUNK_WEBP = struct.Struct("<I")


def _read_webp(file: _File) -> tuple[int, int, int, str]:
    """WebP: RIFF chunks; a simple lossy or lossless stream, or the extended form with a canvas size and EXIF."""
    (riff_size,) = file.unpack(_CHUNK_WEBP, 4)
    if riff_size + 8 > file.size:
        raise BadImage("is cut off (a WebP with fewer bytes than it says); download or export it again")
    kind = file.read(12, 4)
    if kind == b"VP8 ":
        width, height = (value & 0x3FFF for value in file.unpack(struct.Struct("<HH"), 26))
        return height, width, 1, "webp"
    if kind == b"VP8L":
        (bits,) = file.unpack(_CHUNK_WEBP, 21)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 1, "webp"
    if kind != b"VP8X":
        raise BadImage("is a damaged WebP; export it again")
    flags, *size = file.unpack(struct.Struct("<B3x6B"), 20)
    width = 1 + size[0] + (size[1] << 8) + (size[2] << 16)
    height = 1 + size[3] + (size[4] << 8) + (size[5] << 16)
    return height, width, _orientation_of_webp(file) if flags & 8 else 1, "webp"


def _orientation_of_webp(file: _File) -> int:
    """Find the EXIF chunk of an extended WebP."""
    offset = 12
    while offset + 8 <= file.size:
        (length,) = file.unpack(_CHUNK_WEBP, offset + 4)
        if file.read(offset, 4) == b"EXIF":
            content = file.read(offset + 8, length)
            return _orientation_of_exif(content.removeprefix(b"Exif\0\0"))
        offset += 8 + length + length % 2
    return 1


def _read_tiff(file: _File) -> tuple[int, int, int, str]:
    """TIFF: tags of the first page; its strips or tiles must end within the file, its samples be what decoders read."""
    tags = _TiffTags(file.read, file.head)
    width, height = tags.first(256), tags.first(257)
    if not (width and height):
        raise BadImage("is a damaged or cut off TIFF (its first page does not say its size); export it again")
    ends = [
        first + length
        for starts, lengths in ((273, 279), (324, 325))  # strips, tiles
        for first, length in zip(tags.values(starts), tags.values(lengths), strict=False)
    ]
    if not ends or max(ends) > file.size:
        raise BadImage("is cut off (a TIFF with fewer bytes than it says); download or export it again")
    bits, is_float = max(tags.values(_TIFF_BITS), default=1), _TIFF_FLOAT in tags.values(_TIFF_SAMPLE_FORMAT)
    if bits > _MOST_TIFF_BITS or is_float:
        raise BadImage(f"is a TIFF of {bits}-bit {'floating-point ' if is_float else ''}samples; convert it to 8 bits")
    orientation = tags.first(_ORIENTATION_TAG)
    return height, width, orientation if 1 <= orientation <= 8 else 1, "tiff"


class _TiffTags:
    """Integer tags of the first directory of a TIFF stream (also the body of EXIF); missing ones are empty."""

    _WIDTHS: dict[int, str] = {1: "B", 3: "H", 4: "I", 16: "Q"}  # noqa: RUF012

    def __init__(self, read: Callable[[int, int], bytes], head: bytes) -> None:
        self._read = read
        self._order = "<" if head[:2] == b"II" else ">"
        self._big = self._integers("H", 2, 1) == [43]
        self._entries: dict[int, tuple[int, int, int]] = {}
        pointer, count, size = ("Q", "Q", 20) if self._big else ("I", "H", 12)
        directory = self._integers(pointer, 8 if self._big else 4, 1)
        number = self._integers(count, directory[0], 1) if directory else []
        if not number or number[0] > 4096:
            return
        first = directory[0] + struct.calcsize(f"={count}")
        for offset in range(first, first + number[0] * size, size):
            kind = self._integers("H", offset, 2)
            length = self._integers(pointer, offset + 4, 1)
            if len(kind) == 2 and length:
                self._entries[kind[0]] = (kind[1], length[0], offset + (12 if self._big else 8))

    def values(self, tag: int) -> list[int]:
        """Return all integers of a tag."""
        kind, count, offset = self._entries.get(tag, (0, 0, 0))
        code = self._WIDTHS.get(kind)
        if code is None or count > 1 << 22:
            return []
        if struct.calcsize(f"={code}") * count > (8 if self._big else 4):
            place = self._integers("Q" if self._big else "I", offset, 1)
            if not place:
                return []
            offset = place[0]
        return self._integers(code, offset, count)

    def first(self, tag: int) -> int:
        """Return the first integer of a tag, or 0."""
        values = self.values(tag)
        return values[0] if values else 0

    def _integers(self, code: str, offset: int, count: int) -> list[int]:
        """Read `count` integers; none where the stream ends before."""
        layout = f"{self._order}{count}{code}"
        data = self._read(offset, struct.calcsize(layout))
        return list(struct.unpack(layout, data)) if len(data) == struct.calcsize(layout) else []


def _orientation_of_exif(body: bytes) -> int:
    """Read the orientation from the TIFF stream that EXIF is; 1 where it says nothing sensible."""
    if body[:2] not in (b"II", b"MM"):
        return 1
    value = _TiffTags(lambda offset, length: body[offset : offset + length], body).first(_ORIENTATION_TAG)
    return value if 1 <= value <= 8 else 1


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[_File], tuple[int, int, int, str]]], ...] = (
    (lambda head: head.startswith(b"\xff\xd8\xff"), _read_jpeg),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), _read_png),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _read_webp),
    (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _read_tiff),
    (lambda head: head.startswith(b"BM"), _read_bmp),
)
