"""TIFF tags: the numbers in the first directory of a TIFF stream, and what they say of who can decode it."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 258, 259, 262, 277, 284
_TILE_WIDTH, _TILE_HEIGHT, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 322, 323, 338, 339
_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_INTEGERS = frozenset({1, 2})
_FLOAT = 3
_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 7, 8, 32771, 32773, 32946})
"""None, fax (three kinds), LZW, JPEG, Deflate, fax by words, PackBits, Deflate by its older number."""
_FAX = frozenset({2, 3, 4, 32771})
_UNCOMPRESSED, _IN_PLANES, _WHITE_IS_ZERO, _GREYS, _ALPHA_OF_ITS_OWN = 1, 2, 0, frozenset({0, 1}), 2
_TILE_BYTES = 1024
"""libtiff takes tiles without a compression for broken whose size is no multiple of its buffer's."""
_KINDS: dict[int, tuple[range, frozenset[int]]] = {
    0: (range(1, 5), frozenset({8, 16})),  # grey from white
    1: (range(1, 5), frozenset({8, 16})),  # grey from black
    2: (range(3, 5), frozenset({8, 16})),  # RGB
    3: (range(1, 5), frozenset({8})),  # palette
    5: (range(4, 5), frozenset({8})),  # CMYK
    6: (range(3, 4), frozenset({8})),  # YCbCr
    8: (range(3, 4), frozenset({8, 16})),  # CIE L*a*b*
}
"""What OpenCV decodes: photometric interpretation -> samples per pixel, bits per sample."""
_ALONE = {0: frozenset({1}), 1: frozenset({1}), 3: frozenset({1, 4})}
"""Further bits of a sample that is its pixel's only one."""


class TiffTags:
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
        return self._integers(*self._place(tag))

    def span(self, tag: int) -> slice:
        """Return where the integers of a tag lie in the stream."""
        code, offset, count = self._place(tag)
        return slice(offset, offset + struct.calcsize(f"={code}") * count)

    def first(self, tag: int) -> int:
        """Return the first integer of a tag, or 0."""
        values = self.values(tag)
        return values[0] if values else 0

    def _place(self, tag: int) -> tuple[str, int, int]:
        """Return type, offset and number of the integers of a tag; no number where there are none, or far too many."""
        kind, count, offset = self._entries.get(tag, (0, 0, 0))
        code = self._WIDTHS.get(kind)
        if code is None or count > 1 << 22:
            return "B", 0, 0
        if struct.calcsize(f"={code}") * count > (8 if self._big else 4):
            place = self._integers("Q" if self._big else "I", offset, 1)
            return (code, place[0], count) if place else ("B", 0, 0)
        return code, offset, count

    def _integers(self, code: str, offset: int, count: int) -> list[int]:
        """Read `count` integers; none where the stream ends before."""
        layout = f"{self._order}{count}{code}"
        data = self._read(offset, struct.calcsize(layout))
        return list(struct.unpack(layout, data)) if len(data) == struct.calcsize(layout) else []


def is_tiff(encoded: bytes) -> bool:
    """Tell whether a file is TIFF or BigTIFF, by its first bytes."""
    return encoded.startswith(_STARTS)


def tags_of(encoded: bytes) -> TiffTags:
    """Read the tags of a file whose bytes are at hand."""
    return TiffTags(lambda offset, length: encoded[offset : offset + length], encoded)


def with_stored_colours(encoded: bytes, tags: TiffTags) -> bytes:
    """Take from a file the word that its colours are still to be multiplied by alpha, as libtiff would do with them."""
    if _ALPHA_OF_ITS_OWN not in tags.values(_EXTRA_SAMPLES):
        return encoded
    changed = bytearray(encoded)
    place = tags.span(_EXTRA_SAMPLES)
    changed[place] = bytes(place.stop - place.start)  # samples that mean nothing in particular
    return bytes(changed)


def is_deep_grey(tags: TiffTags) -> bool:
    """Tell whether pixels are one 16-bit sample in tiles: libtiff skews those that reach over the right edge.

    They come out right where OpenCV is asked for all their bits, which it then reads without libtiff's conversion.
    """
    one_deep = tags.values(_BITS) == [16] and tags.first(_PHOTOMETRIC) in _GREYS
    return bool(one_deep and tags.first(_TILE_WIDTH))


def is_white_zero(tags: TiffTags) -> bool:
    """Tell whether grey counts from white."""
    return tags.first(_PHOTOMETRIC) == _WHITE_IS_ZERO


def why_undecodable(tags: TiffTags) -> str:
    """Say what OpenCV cannot decode in a TIFF file; empty where it decodes all.

    Pixels under a compression that it does not know come out as noise, so those are refused whatever the decoder says.
    """
    bits, formats = tags.values(_BITS) or [1], tags.values(_SAMPLE_FORMAT) or [1]
    samples, compression = tags.first(_SAMPLES) or 1, tags.first(_COMPRESSION) or 1
    if compression not in _COMPRESSIONS:
        return f"compression {compression}"
    if _FLOAT in formats:
        return f"{max(bits)}-bit floating-point samples"
    if not _INTEGERS.issuperset(formats):
        return f"samples of format {max(formats)}"
    kind = tags.first(_PHOTOMETRIC)
    if kind not in _KINDS or not tags.values(_PHOTOMETRIC):
        return "colours of an unknown kind"
    counts, depths = _KINDS[kind]
    if samples == 1:
        depths |= _ALONE.get(kind, frozenset())
    if compression in _FAX:
        depths &= {1}
    if samples not in counts:
        return f"{samples} samples per pixel"
    if not depths.issuperset(bits) or max(bits) != min(bits):
        return f"{' + '.join(map(str, sorted(set(bits))))}-bit samples"
    return _why_tiles_are_not(tags, samples, max(bits))


def _why_tiles_are_not(tags: TiffTags, samples: int, bits: int) -> str:
    """Say which tiles libtiff gets wrong, by a defect of its own; empty where it reads them, or there are none."""
    height, width = tags.first(_TILE_HEIGHT), tags.first(_TILE_WIDTH)
    if not (height and width) or is_deep_grey(tags):
        return ""
    together = 1 if tags.first(_PLANAR) == _IN_PLANES else samples
    num_bytes = (width * together * bits + 7) // 8 * height
    if (tags.first(_COMPRESSION) or _UNCOMPRESSED) == _UNCOMPRESSED and num_bytes % _TILE_BYTES:
        return f"tiles of {width} x {height} px without a compression"
    if together > 1 and tags.first(_PHOTOMETRIC) in _GREYS and tags.first(_WIDTH) % width:
        return f"grey and alpha in tiles of {width} x {height} px that reach over its edge"
    return ""
