"""Pack: an open pack. Opening reads its header and its tables, whatever the number of images."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.formats.yaml_file import SPLITS
from paceline.data.headers import BadImage
from paceline.data.index import Index, Strings
from paceline.data.pack.coherence import require_coherence, require_entries
from paceline.data.pack.layout import COLUMNS, ENTRIES, HEADER, MAGIC, Directory, Header, TornPackError
from paceline.data.pack.medium import LocalFile, ShortReadError, let_go
from paceline.data.polygons import Polygons
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from paceline.data.pack.layout import Column
    from paceline.data.pack.medium import Medium

_MEND = "make it anew with `paceline data pack`, or copy it again"


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedSplit:
    """Where the images of a split are."""

    pack: Pack
    entries: NDArray[np.int64]
    """N, entry of each image of the whole split."""


class Pack:
    """What is in a pack; entries can be read by several threads.

    A damaged header, directory or table is a UserError when the pack, or the index of a split, is opened. A damaged
    entry is a BadImage when it is read for the first time. A file that is cut off later is a UserError.
    """

    def __init__(self, medium: Medium) -> None:
        self.address = medium.address
        self._medium = medium
        try:
            header = Header.decode(medium.head(HEADER.itemsize))
            if header.file_bytes != medium.num_bytes:
                raise TornPackError(f"has {medium.num_bytes:,} bytes where {header.file_bytes:,} are said to be")
            self._start = header.tables_start
            self._tables = medium.map(header.tables_start, header.file_bytes)
            self._directory = self._read_directory(header)
            mapped = self._columns(self._directory.entries, ENTRIES)
            require_entries(mapped, HEADER.itemsize, header.tables_start)
        except (TornPackError, ShortReadError) as error:
            raise self._torn(error) from error
        self._entries = {name: column.copy() for name, column in mapped.items()}  # 20 bytes per image
        self._seen = np.zeros(len(self._entries["lengths"]), np.bool_)
        self._version = medium.version

    @classmethod
    def open(cls, path: Path, cache_folder: Path | None = None) -> Pack:
        """Open a pack that is a file; large tables are copied into `cache_folder`, the package's own if None.

        Raises UserError.
        """
        try:
            return cls(LocalFile(path, cache_folder))
        except OSError as error:
            raise UserError(f"Cannot open {path}: {error.strerror or error}; check the file.") from error

    @property
    def names(self) -> tuple[str, ...]:
        """K class names."""
        return self._directory.names

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, val and test that it has."""
        return tuple(split for split in SPLITS if split in self._directory.splits)

    @property
    def made_from(self) -> str:
        """Format of the data set that it was made from."""
        return self._directory.format

    @property
    def decoded(self) -> bool:
        """Whether its entries are pixels."""
        return self._directory.decoded

    @property
    def imgsz(self) -> int:
        """Side of the network's input for which its images were reduced; 0 where they have their full size."""
        return self._directory.imgsz

    @property
    def place(self) -> Path:
        """Where names of images in it start from, in messages: its file, or the last part of its address."""
        return Path(self.address.partition("?")[0].rpartition("/")[2] if "://" in self.address else self.address)

    def __len__(self) -> int:
        """Count the entries."""
        return len(self._seen)

    def index(self, split: str) -> Index:
        """Return the index of a split, large arrays mapped; raises UserError where its tables are damaged."""
        table = self._directory.splits[split]
        try:
            columns = self._columns(table.columns, COLUMNS)
            require_coherence(columns, table.num_images, table.num_boxes, len(self), len(self.names))
        except TornPackError as error:
            raise self._torn(error) from error
        paths = Strings(blob=columns.pop("paths.blob"), offsets=columns.pop("paths.offsets"))
        polygons = Polygons(**{name: columns.pop(f"polygons.{name}") for name in ("points", "rings", "boxes")})
        packed = PackedSplit(pack=self, entries=columns.pop("entries"))
        return Index(
            names=self.names,
            root=self.place,
            paths=paths,
            category_ids=np.array(self._directory.category_ids, np.int64),
            origins=np.arange(table.num_images),
            polygons=polygons,
            packed=packed,
            **columns,
        )

    def read(self, entry: int) -> bytes:
        """Return the bytes of an entry; its checksum is compared the first time, and again once the file was changed.

        Raises BadImage, and UserError where the file was cut off.
        """
        start, length, checksum = (int(self._entries[name][entry]) for name in ENTRIES)
        try:
            content = self._medium.read(start, length)
            if self._medium.version != self._version:
                self._version = self._medium.version
                self._seen[:] = False
            if not self._seen[entry] and zlib.crc32(content) != checksum:
                if not self._medium.forget(start, length):
                    raise BadImage("is damaged in the pack (its checksum is another); copy or make the pack anew")
                content = self._medium.read(start, length)
                if zlib.crc32(content) != checksum:
                    raise BadImage("is damaged in the pack (its checksum is another); copy or make the pack anew")
        except ShortReadError as error:
            raise BadImage("is not in the pack any more, which was cut off; copy or make the pack anew") from error
        except OSError as error:
            raise BadImage(f"cannot be read from the pack ({error.strerror or error})") from error
        self._seen[entry] = True
        return content

    def stamp(self, entry: int) -> tuple[int, int]:
        """Return the bytes and the checksum of an entry."""
        return int(self._entries["lengths"][entry]), int(self._entries["checksums"][entry])

    def close(self) -> None:
        """Let go of the file; indexes stay usable, entries do not."""
        self._medium.close()

    def _read_directory(self, header: Header) -> Directory:
        first = header.directory_start - header.tables_start
        content = bytes(self._tables[max(first, 0) : first + header.directory_bytes])
        if len(content) != header.directory_bytes or zlib.crc32(content) != header.directory_checksum:
            raise TornPackError("has a damaged directory")
        return Directory.decode(content)

    def _columns(self, found: Mapping[str, Column], known: Mapping[str, str]) -> dict[str, NDArray[Any]]:
        """Return those columns that are known; raises TornPackError where one is missing or damaged."""
        for name, dtype in known.items():
            if name not in found or np.dtype(found[name].dtype) != np.dtype(dtype):
                raise TornPackError(f"has no column {name} of the dtype {dtype}")
        columns = {name: found[name].view(self._tables, self._start) for name in known}
        let_go(self._tables)
        return columns

    def _torn(self, error: Exception) -> UserError:
        return UserError(f"{self.address} {error}; {_MEND}.")


def is_pack(path: Path) -> bool:
    """Tell whether a file is a pack, or is called one."""
    if path.suffix.lower() == ".pack":
        return True
    try:
        with path.open("rb") as stream:
            return stream.read(len(MAGIC)) == MAGIC
    except OSError:
        return False
