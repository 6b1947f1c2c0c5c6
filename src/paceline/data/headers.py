"""Headers: size and orientation of an image file, and whether the file is whole, without decoding its pixels."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.data.tiff_tags import TiffTags, why_undecodable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff"})
"""Endings of file names, in lower case, that are taken for images; what a file is, its content decides."""

_HEAD_BYTES = 4096
_TAIL_BYTES = 64
_LONGEST_SIDE_PX = (1 << 31) - 1
"""As PNG has it, and what an index can hold."""
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_DECODABLE = frozenset({0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA})
"""Baseline, extended, progressive, lossless; extended and progressive with arithmetic coding. No hierarchical ones."""
_PNG_BITS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
"""Colour type -> bits per sample, as the standard has them."""
_PNG_PALETTE = 3
_ORIENTATION_TAG = 274

UNDECODABLE = "cannot be decoded"
"""How the reason of a BadImage begins where the file is there, whole by its header, and no decoder takes it."""


REFUSED = "check the file and its permissions"
"""How the reason ends where the system would not give the file, which may be another time, with no change of it."""


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
        """Return `length` bytes from `offset`; fewer where the file ends before, none where `length` is negative."""
        length = max(length, 0)
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
        raise BadImage(f"cannot be opened ({error.strerror}); {REFUSED}") from error
    try:
        file = _File(descriptor)
        for recognise, parse in _READERS:
            if recognise(file.head):
                height, width, orientation, kind = parse(file)
                break
        else:
            raise BadImage(_what_it_is(file))
    except OSError as error:
        raise BadImage(f"cannot be read ({error.strerror}); {REFUSED}") from error
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


_MARKER = struct.Struct(">BBH")
_SIZE_JPEG = struct.Struct(">BHHB")


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
            bits, height, width, components = file.unpack(_SIZE_JPEG, offset + 4)
            _require_decodable_jpeg(marker, bits, components)
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


def _require_decodable_jpeg(marker: int, bits: int, components: int) -> None:
    """Raise BadImage for a kind of JPEG that libjpeg-turbo does not decode to 8 bits."""
    if bits != 8:
        raise BadImage(f"{UNDECODABLE}: a JPEG of {bits}-bit samples; convert it to 8 bits")
    if marker not in _JPEG_DECODABLE:
        raise BadImage(f"{UNDECODABLE}: a JPEG of process {marker - 0xC0}; convert it to a baseline JPEG, or PNG")
    if components not in (1, 3, 4):
        raise BadImage(f"{UNDECODABLE}: a JPEG of {components} components; convert it to grey or RGB")


def _ends_jpeg(file: _File, scan: int) -> bool:
    """Look for the end-of-image marker behind the start of the scan, where FF D9 can be nothing else."""
    near = max(scan, file.size - _TAIL_BYTES)
    if b"\xff\xd9" in file.read(near, file.size - near):
        return True
    return scan < near and b"\xff\xd9" in file.read(scan, file.size - scan)  # a long trailer, as phones write


_CHUNK_PNG = struct.Struct(">I4x")
_SIZE_PNG = struct.Struct(">IIBBBBB")


def _read_png(file: _File) -> tuple[int, int, int, str]:
    """PNG: size from IHDR, orientation from eXIf if it comes before the pixels; IEND must be there."""
    if file.read(12, 4) != b"IHDR":
        raise BadImage("is a damaged PNG (no IHDR chunk); export it again")
    width, height, bits, colours, compression, filters, interlace = file.unpack(_SIZE_PNG, 16)
    if bits not in _PNG_BITS.get(colours, ()) or compression or filters or interlace > 1:
        raise BadImage(f"is a damaged PNG ({bits} bits of colour type {colours} are none); export it again")
    orientation, needs = 1, {b"PLTE", b"IDAT"} if colours == _PNG_PALETTE else {b"IDAT"}
    for kind, offset, length in _png_chunks(file, 33):
        needs.discard(kind)
        if kind == b"IDAT":
            break
        if kind == b"eXIf":
            orientation = _orientation_of_exif(file.read(offset, length))
    if file.read(max(file.size - 8, 0), 4) != b"IEND" and all(kind != b"IEND" for kind, _, _ in _png_chunks(file, 33)):
        raise BadImage("is cut off (a PNG without its end); download or export it again")
    if needs:
        raise BadImage(f"is a damaged PNG (no {min(needs).decode()} chunk); export it again")
    return height, width, orientation, "png"


def _png_chunks(file: _File, offset: int) -> Iterator[tuple[bytes, int, int]]:
    """Yield (kind, offset of the content, length) of each chunk that is there."""
    while offset + 8 <= file.size:
        (length,) = file.unpack(_CHUNK_PNG, offset)
        yield file.read(offset + 4, 4), offset + 8, length
        offset += 12 + length


_SIZE_BMP = struct.Struct("<iiHHI")
_SIZE_BMP_CORE = struct.Struct("<HHHH")
_BMP_CORE_BYTES, _BMP_LEAST_BYTES, _BMP_INFO_BYTES = 12, 36, 40
_BMP_BITS = {0: (1, 4, 8, 16, 24, 32), 1: (8,), 2: (4,), 3: (16, 32)}
"""Compression (none, two of run lengths, masks of bits) -> bits per pixel."""


def _read_bmp(file: _File) -> tuple[int, int, int, str]:
    """BMP: size from the information header; pixels must fit in the file where they are not compressed."""
    pixels, header_size = file.unpack(struct.Struct("<II"), 10)
    if header_size == _BMP_CORE_BYTES:
        width, height, _, bits = file.unpack(_SIZE_BMP_CORE, 18)
        compression = 0
    else:
        width, height, _, bits, compression = file.unpack(_SIZE_BMP, 18)
    height = abs(height)  # negative means that rows come from the top
    _require_decodable_bmp(header_size, bits, compression)
    if compression in (0, 3) and pixels + (width * bits + 31) // 32 * 4 * height > file.size:
        raise BadImage("is cut off (a BMP with fewer pixels than it says); download or export it again")
    return height, width, 1, "bmp"


def _require_decodable_bmp(header_size: int, bits: int, compression: int) -> None:
    """Raise BadImage for a kind of BMP that OpenCV does not decode."""
    if header_size == _BMP_CORE_BYTES:
        known = bits in (1, 4, 8, 24, 32)
    elif bits == 16 and compression == 3:
        known = header_size == _BMP_INFO_BYTES  # where the masks come behind the header
    else:
        known = header_size >= _BMP_LEAST_BYTES and bits in _BMP_BITS.get(compression, ())
    if not known:
        kind = f"{bits} bits per pixel, compression {compression}, a header of {header_size} bytes"
        raise BadImage(f"{UNDECODABLE}: a BMP of {kind}; convert it to PNG")


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
    tags = TiffTags(file.read, file.head)
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
    reason = why_undecodable(tags)
    if reason:
        mend = "in strips" if "tiles" in reason else "without a compression"
        raise BadImage(f"{UNDECODABLE}: a TIFF of {reason}; convert it to 8 bits, grey or RGB, {mend}")
    orientation = tags.first(_ORIENTATION_TAG)
    return height, width, orientation if 1 <= orientation <= 8 else 1, "tiff"


def _orientation_of_exif(body: bytes) -> int:
    """Read the orientation from the TIFF stream that EXIF is; 1 where it says nothing sensible."""
    if body[:2] not in (b"II", b"MM"):
        return 1
    value = TiffTags(lambda offset, length: body[offset : offset + length], body).first(_ORIENTATION_TAG)
    return value if 1 <= value <= 8 else 1


_READERS: tuple[tuple[Callable[[bytes], bool], Callable[[_File], tuple[int, int, int, str]]], ...] = (
    (lambda head: head.startswith(b"\xff\xd8\xff"), _read_jpeg),
    (lambda head: head.startswith(b"\x89PNG\r\n\x1a\n"), _read_png),
    (lambda head: head[:4] == b"RIFF" and head[8:12] == b"WEBP", _read_webp),
    (lambda head: head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), _read_tiff),
    (lambda head: head.startswith(b"BM"), _read_bmp),
)
