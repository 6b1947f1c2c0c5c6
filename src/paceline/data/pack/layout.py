"""Layout: what lies where in a pack file, as tables of dtypes. All numbers are little-endian.

```
        0  header       64 bytes, HEADER
       64  entry 0      the bytes of an image: its file as it was, or (decoded) a raw image; see data/raw.py
           entry 1 ...  each entry starts at a multiple of 64; an image that is in several splits is there once
   tables  columns      at a multiple of 4096: the columns ENTRIES, then COLUMNS of each split, each at a multiple of 64
           directory    JSON: where each column lies, its dtype, shape and CRC-32; splits, class names
      end
```

Everything that is needed to open a pack lies in the header and from `tables_start` to the end, however many images
there are. Every byte that is used is under a CRC-32: the header's, the directory's, a column's or an entry's.

The header of a newer version may mean something else but for its first two fields, so a reader of an older version can
always tell that it is one. New columns may come without a new version: readers pass over those that they do not know.
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

MAGIC = b"\x89PLPACK\n"
VERSION = 1
ALIGN_BYTES = 64
PAGE_BYTES = 4096

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("checksum", "<u4"),  # CRC-32 of the header, with 0 in this field
        ("file_bytes", "<u8"),  # size of the whole file
        ("tables_start", "<u8"),
        ("directory_start", "<u8"),
        ("directory_bytes", "<u8"),
        ("directory_checksum", "<u4"),
        ("reserved", "V12"),
    ]
)

ENTRIES: dict[str, str] = {
    "starts": "<u8",  # E, first byte in the file
    "lengths": "<u8",  # E, bytes
    "checksums": "<u4",  # E, CRC-32
}
"""Columns of the E images of all splits together."""

COLUMNS: dict[str, str] = {
    "paths.blob": "<u1",  # file names, relative, in the encoding of file names, after each other
    "paths.offsets": "<i8",  # N + 1, first byte of each name
    "sizes": "<i4",  # N2, (height, width) in pixels after EXIF rotation, before any reduction
    "orientation": "<u1",  # N, EXIF, 1 to 8; 1 in a decoded pack, whose pixels are upright
    "offsets": "<i8",  # N + 1, first box of each image
    "boxes": "<f8",  # M4, xyxy in pixels of `sizes`
    "labels": "<i4",  # M, class numbers
    "crowd": "|b1",  # M
    "difficult": "|b1",  # M
    "area": "<f8",  # M, square pixels
    "image_ids": "<i8",  # N
    "entries": "<i8",  # N, entry of each image
    "polygons.points": "<f4",  # P2, x and y of the outlines' points, in pixels of `sizes`
    "polygons.rings": "<i8",  # R + 1, first point of each ring
    "polygons.boxes": "<i8",  # M + 1, first ring of each box; empty where no box has an outline
}
"""Columns of a split with N images and M boxes."""


class TornPackError(ValueError):
    """A pack that is cut off, damaged, or of another version; the message says which, without the file."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header, checked."""

    file_bytes: int
    tables_start: int
    directory_start: int
    directory_bytes: int
    directory_checksum: int

    def encode(self) -> bytes:
        """Return its 64 bytes."""
        record = np.zeros(1, HEADER)
        record["magic"], record["version"] = MAGIC, VERSION
        for name in self.__dataclass_fields__:
            record[name] = getattr(self, name)
        record["checksum"] = zlib.crc32(record.tobytes())
        return record.tobytes()

    @classmethod
    def decode(cls, content: bytes) -> Header:
        """Read and check the first bytes of a file; raises TornPackError."""
        if content[: len(MAGIC)] != MAGIC:
            raise TornPackError("is no pack, or its beginning is damaged")
        if len(content) < HEADER.itemsize:
            raise TornPackError("is cut off")
        record = np.frombuffer(content[: HEADER.itemsize], HEADER).copy()
        version, checksum = int(record["version"][0]), int(record["checksum"][0])
        if version > VERSION:
            raise TornPackError(f"has version {version} of the format, and this Paceline reads version {VERSION}")
        record["checksum"] = 0
        if checksum != zlib.crc32(record.tobytes()) or version != VERSION:
            raise TornPackError("has a damaged header")
        return cls(**{name: int(record[name][0]) for name in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class Column:
    """Where a column lies."""

    start: int
    dtype: str
    shape: tuple[int, ...]
    checksum: int

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def view(self, tables: memoryview, tables_start: int) -> NDArray[Any]:
        """Return the column as an array over `tables`; raises TornPackError where its checksum is another."""
        first = self.start - tables_start
        content = tables[first : first + self.num_bytes]
        if (
            first < 0
            or min(self.shape, default=0) < 0
            or len(content) != self.num_bytes
            or zlib.crc32(content) != self.checksum
        ):
            raise TornPackError("has a damaged table")
        return np.frombuffer(content, self.dtype).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class SplitTable:
    """What the directory says of a split."""

    num_images: int
    num_boxes: int
    columns: Mapping[str, Column]


@dataclass(frozen=True, kw_only=True)
class Directory:
    """What is in a pack, and where its columns lie."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    format: str
    """Format of the data set that it was made from."""
    decoded: bool
    imgsz: int
    """Side of the network's input for which decoded images were reduced; 0 where they have their full size."""
    entries: Mapping[str, Column]
    splits: Mapping[str, SplitTable]

    def encode(self) -> bytes:
        """Return it as JSON in ASCII, the same bytes for the same content."""

        def plain(value: object) -> Any:
            return {entry.name: getattr(value, entry.name) for entry in fields(value)}  # type: ignore[arg-type]

        return json.dumps(self, default=plain, separators=(",", ":"), sort_keys=True).encode("ascii")

    @classmethod
    def decode(cls, content: bytes) -> Directory:
        """Read JSON; raises TornPackError."""
        try:
            found = json.loads(content)
            return cls(
                names=tuple(str(name) for name in found["names"]),
                category_ids=tuple(int(number) for number in found["category_ids"]),
                format=str(found["format"]),
                decoded=bool(found["decoded"]),
                imgsz=int(found["imgsz"]),
                entries=_columns(found["entries"]),
                splits={
                    str(name): SplitTable(
                        num_images=int(split["num_images"]),
                        num_boxes=int(split["num_boxes"]),
                        columns=_columns(split["columns"]),
                    )
                    for name, split in found["splits"].items()
                },
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
            raise TornPackError("has a damaged directory") from error


def _columns(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Column]:
    return {
        str(name): Column(
            start=int(entry["start"]),
            dtype=str(entry["dtype"]),
            shape=tuple(int(side) for side in entry["shape"]),
            checksum=int(entry["checksum"]),
        )
        for name, entry in found.items()
    }
