"""Index: one table of images and boxes, as numpy arrays that may lie in a memory-mapped file."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from paceline.data.polygons import Polygons
from paceline.records import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from io import FileIO
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.pack.reader import PackedSplit

_ARRAYS = {
    "paths.blob": np.uint8,
    "paths.offsets": np.int64,
    "sizes": np.int32,
    "orientation": np.uint8,
    "offsets": np.int64,
    "boxes": np.float64,
    "labels": np.int32,
    "crowd": np.bool_,
    "difficult": np.bool_,
    "area": np.float64,
    "image_ids": np.int64,
    "category_ids": np.int64,
    "origins": np.int64,
    "polygons.points": np.float32,
    "polygons.rings": np.int64,
    "polygons.boxes": np.int64,
}
_STORED_AS = {
    "U8": np.uint8,
    "I32": np.int32,
    "I64": np.int64,
    "F32": np.float32,
    "F64": np.float64,
    "BOOL": np.bool_,
}
_VERSION = "2"
_BLOCK = 1 << 16
"""Texts that are handled at once."""
_READ_BYTES = 1 << 20
MOST_COPIED_BYTES = 64 << 20
"""Files up to this size, those of some 100,000 images, are held in memory; larger ones stay mapped."""


class TornIndexError(ValueError):
    """A stored index that is cut off, damaged or of another version; it has to be built again."""


class OtherVersionError(TornIndexError):
    """A stored index whose texts name another version of the format: an update of Paceline, not damage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Strings:
    """N texts in one byte array: text i is `blob[offsets[i]:offsets[i + 1]]`, encoded as file names are."""

    blob: NDArray[np.uint8]
    offsets: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Iterable[str]) -> Strings:
        """Pack texts, none of which holds a zero character, as no file name does."""
        texts = tuple(texts)
        joined = np.frombuffer(os.fsencode("\0".join((*texts, ""))), np.uint8)
        ends = np.flatnonzero(joined == 0)
        assert len(ends) == len(texts), "a text holds a zero character"
        offsets = np.concatenate([np.zeros(1, np.int64), ends - np.arange(len(texts))])
        return cls(blob=joined[joined != 0], offsets=offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> str:
        if not 0 <= row < len(self):
            raise IndexError(row)
        return os.fsdecode(self.blob[self.offsets[row] : self.offsets[row + 1]].tobytes())

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _BLOCK):
            offsets = self.offsets[first : first + _BLOCK + 1].tolist()
            blob = self.blob[offsets[0] : offsets[-1]].tobytes()
            start = offsets[0]
            yield from (os.fsdecode(blob[begin - start : end - start]) for begin, end in pairwise(offsets))

    def take(self, rows: NDArray[np.integer]) -> Strings:
        """Return the texts `rows`, in that order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        blob = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(rows), _BLOCK):  # so that the numbers of bytes need little memory
            block = slice(first, first + _BLOCK)
            start, end = offsets[first], offsets[min(first + _BLOCK, len(rows))]
            places = np.repeat(self.offsets[rows[block]] - offsets[:-1][block], lengths[block])
            blob[start:end] = self.blob[places + np.arange(start, end)]
        return Strings(blob=blob, offsets=offsets)


@dataclass(frozen=True, kw_only=True, eq=False)
class Index:
    """N images and their M boxes in original pixels; the boxes of image i are the rows `slice(i)`.

    Boxes lie inside their image and have an area. Training targets are those that are neither crowd nor difficult.
    """

    names: tuple[str, ...]
    """K class names."""
    root: Path
    """Folder that relative `paths` start from."""
    paths: Strings
    """N image files, relative to `root` or absolute."""
    sizes: NDArray[np.int32]
    """N2, (height, width) in pixels after EXIF rotation."""
    orientation: NDArray[np.uint8]
    """N, EXIF orientation of the file, 1 to 8; 1 is upright."""
    offsets: NDArray[np.int64]
    """N + 1, first row of each image in the arrays of boxes."""
    boxes: NDArray[np.float64]
    """M4, xyxy in pixels of the image after EXIF rotation."""
    labels: NDArray[np.int32]
    """M, class numbers from 0 to K - 1."""
    crowd: NDArray[np.bool_]
    """M, boxes around many objects: no targets, and evaluation takes them as regions to ignore."""
    difficult: NDArray[np.bool_]
    """M, boxes that neither training nor evaluation counts."""
    area: NDArray[np.float64]
    """M, square pixels; that of the annotation where the format has one, else of the box."""
    image_ids: NDArray[np.int64]
    """N, ids of the images in a COCO file, else the row."""
    category_ids: NDArray[np.int64]
    """K, ids of the classes in a COCO file, else 0 to K - 1."""
    origins: NDArray[np.int64]
    """N, row of each image in the table of the whole split, which `select_images` keeps."""
    polygons: Polygons = field(default_factory=Polygons.none)
    """Outlines of the boxes, in pixels as these are, but not cut to the image; empty where the format has none."""
    packed: PackedSplit | None = None
    """Where the images are in a pack; None where they are files."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def path(self, row: int) -> Path:
        """File of an image."""
        return self.root / self.paths[row]

    def slice(self, row: int) -> slice:
        """Rows of an image's boxes."""
        return slice(int(self.offsets[row]), int(self.offsets[row + 1]))

    @property
    def targets(self) -> NDArray[np.bool_]:
        """M, True for boxes to train on."""
        mask: NDArray[np.bool_] = ~(self.crowd | self.difficult)
        return mask

    @property
    def images_of_boxes(self) -> NDArray[np.int64]:
        """M, row of the image that each box lies in."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))

    def select_images(self, rows: NDArray[np.integer]) -> Index:
        """Return the index of the images `rows`, in that order, with their boxes."""
        rows = np.asarray(rows, np.int64)
        counts = np.diff(self.offsets)[rows]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
        picked = np.repeat(self.offsets[rows] - offsets[:-1], counts)
        picked += np.arange(len(picked))
        return Index(
            names=self.names,
            root=self.root,
            paths=self.paths.take(rows),
            sizes=self.sizes[rows],
            orientation=self.orientation[rows],
            offsets=offsets,
            boxes=self.boxes[picked],
            labels=self.labels[picked],
            crowd=self.crowd[picked],
            difficult=self.difficult[picked],
            area=self.area[picked],
            image_ids=self.image_ids[rows],
            category_ids=self.category_ids,
            origins=self.origins[rows],
            polygons=self.polygons.select(picked),
            packed=self.packed,
        )

    def select_boxes(self, keep: NDArray[np.bool_]) -> Index:
        """Return the index of the same images with the boxes where the mask `keep` (M) is True."""
        kept_before = np.concatenate([np.zeros(1, np.int64), np.cumsum(keep, dtype=np.int64)])
        return Index(
            names=self.names,
            root=self.root,
            paths=self.paths,
            sizes=self.sizes,
            orientation=self.orientation,
            offsets=kept_before[self.offsets],
            boxes=self.boxes[keep],
            labels=self.labels[keep],
            crowd=self.crowd[keep],
            difficult=self.difficult[keep],
            area=self.area[keep],
            image_ids=self.image_ids,
            category_ids=self.category_ids,
            origins=self.origins,
            polygons=self.polygons.select(keep),
            packed=self.packed,
        )

    def digest(self) -> str:
        """Hash everything but the place of the files, so that copies of a set on other hosts have the same."""
        arrays: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(self._array(name), dtype) for name, dtype in _ARRAYS.items()
        }
        contents = {name: [array.reshape(-1).view(np.uint8).data] for name, array in arrays.items()}
        return f"{_checksum(contents, {'names': json.dumps(self.names)}):08x}"

    def save(self, file: Path, notes: Mapping[str, str] | None = None) -> None:
        """Write a safetensors file in one atomic step; `notes` are kept with it.

        Raises UserError where the file cannot be written.
        """
        arrays: dict[str, NDArray[Any]] = {
            name: np.ascontiguousarray(self._array(name), dtype) for name, dtype in _ARRAYS.items()
        }
        texts = {"version": _VERSION, "names": json.dumps(self.names), "notes": json.dumps(dict(notes or {}))}
        contents = {name: [array.reshape(-1).view(np.uint8).data] for name, array in arrays.items()}
        checksum = str(_checksum(contents, texts))
        write_atomically(file, safetensors_numpy.save(arrays, texts | {"checksum": checksum}))

    @classmethod
    def load(cls, file: Path, root: Path) -> tuple[Index, dict[str, str]]:
        """Map a file that `save` wrote; return it with its notes.

        Raises OtherVersionError where another version wrote it, TornIndexError where the file is damaged,
        FileNotFoundError where there is none.
        """
        with file.open("rb", buffering=0) as stream:
            arrays, places, metadata = _map_arrays(file, stream)
            contents = {name: _blocks(stream, *place) for name, place in places.items()}
            try:
                checksum = metadata.pop("checksum")
                if metadata["version"] != _VERSION or checksum != str(_checksum(contents, metadata)):
                    raise TornIndexError(f"{file}: its checksum or version is another")
                names, notes = tuple(json.loads(metadata["names"])), dict(json.loads(metadata["notes"]))
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise TornIndexError(f"{file}: {error}") from error
        paths = Strings(blob=arrays.pop("paths.blob"), offsets=arrays.pop("paths.offsets"))
        polygons = Polygons(**{name: arrays.pop(f"polygons.{name}") for name in ("points", "rings", "boxes")})
        return cls(names=names, root=root, paths=paths, polygons=polygons, packed=None, **arrays), notes

    def _array(self, name: str) -> NDArray[Any]:
        """Return an array by its name in the file."""
        columns: dict[str, NDArray[Any]] = {
            "paths.blob": self.paths.blob,
            "paths.offsets": self.paths.offsets,
            "sizes": self.sizes,
            "orientation": self.orientation,
            "offsets": self.offsets,
            "boxes": self.boxes,
            "labels": self.labels,
            "crowd": self.crowd,
            "difficult": self.difficult,
            "area": self.area,
            "image_ids": self.image_ids,
            "category_ids": self.category_ids,
            "origins": self.origins,
            "polygons.points": self.polygons.points,
            "polygons.rings": self.polygons.rings,
            "polygons.boxes": self.polygons.boxes,
        }
        return columns[name]


def _checksum(contents: Mapping[str, Iterable[memoryview]], texts: Mapping[str, str]) -> int:
    """CRC-32 over all texts and the bytes of all arrays, in the order of their names."""
    value = zlib.crc32(json.dumps(sorted(texts.items())).encode())
    for name in sorted(contents):
        for block in contents[name]:
            value = zlib.crc32(block, value)
    return value


def _blocks(stream: FileIO, first: int, last: int) -> Iterator[memoryview]:
    """Yield the bytes from `first` to `last` of a file, in a buffer that is used again.

    Reading what is mapped as well leaves the mapping untouched, so that only rows that are looked up become resident.
    """
    buffer = memoryview(bytearray(_READ_BYTES))
    while first < last:
        stream.seek(first)
        number = stream.readinto(buffer[: last - first])
        if not number:
            return
        yield buffer[:number]
        first += number


def _map_arrays(
    file: Path, stream: FileIO
) -> tuple[dict[str, NDArray[Any]], dict[str, tuple[int, int]], dict[str, str]]:
    """Map the arrays of a safetensors file, or read them if they are few; return them, their places, and its texts.

    Layout: 8 bytes length of the header (little-endian), header (JSON), data; offsets count from the data's start.
    """
    num_bytes = os.fstat(stream.fileno()).st_size
    if num_bytes < 8:
        raise TornIndexError(f"{file}: too short")
    data = np.fromfile(stream, np.uint8) if num_bytes <= MOST_COPIED_BYTES else np.memmap(stream, np.uint8, "r")
    if len(data) < 8:
        raise TornIndexError(f"{file}: cut off")
    data.flags.writeable = False
    start = 8 + int(data[:8].view("<u8")[0])
    try:
        header = json.loads(data[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        arrays: dict[str, NDArray[Any]] = {}
        places: dict[str, tuple[int, int]] = {}
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            if not start <= first <= last <= len(data):
                raise TornIndexError(f"{file}: cut off")
            places[name] = first, last
            arrays[name] = data[first:last].view(_STORED_AS[entry["dtype"]]).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TornIndexError(f"{file}: {error}") from error
    version = metadata.get("version", _VERSION) if isinstance(metadata, dict) else _VERSION
    if version != _VERSION:  # before the names of its arrays, which may be others
        raise OtherVersionError(f"{file}: is of version {version}, not {_VERSION}")
    if set(arrays) != set(_ARRAYS):
        raise TornIndexError(f"{file}: holds other arrays")
    return arrays, places, metadata
