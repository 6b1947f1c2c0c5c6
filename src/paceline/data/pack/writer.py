"""Pack writer: images one after another, then the tables, then the header; the file gets its name when it is whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from paceline.data.decode import decode_compact, reductions
from paceline.data.headers import BadImage
from paceline.data.index import Strings
from paceline.data.pack.layout import (
    ALIGN_BYTES,
    COLUMNS,
    ENTRIES,
    HEADER,
    PAGE_BYTES,
    Column,
    Directory,
    Header,
    SplitTable,
)
from paceline.data.pack.store import store_of
from paceline.data.raw import to_raw
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
    from concurrent.futures import Future
    from typing import BinaryIO

    from numpy.typing import NDArray

    from paceline.data.index import Index
    from paceline.data.store import Store

Progress: TypeAlias = "Callable[[int, int], None]"
"""Is told how many images are done, and of how many."""
MOST_LISTED = 20
"""Images that cannot be read which an error lists; packing ends at five times as many."""
_AHEAD_PER_THREAD = 4


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How images are packed."""

    decoded: bool = False
    """As pixels, instead of as the files are."""
    imgsz: int = 0
    """Reduce decoded images by 2, 4 or 8 where that leaves this many pixels along the long side; 0 reduces nothing."""


@dataclass(frozen=True, kw_only=True)
class PackReport:
    """What was written."""

    num_entries: int
    num_images: int
    """Images of all splits; one that is in several splits is one entry."""
    num_boxes: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Job:
    """An image to be packed."""

    store: Store
    row: int
    name: str
    size: tuple[int, int]
    """Height and width in the index."""
    orientation: int
    reduction: int

    def content(self, config: PackConfig) -> bytes:
        """Return the bytes of its entry."""
        encoded = self.store.read(self.row)
        if not config.decoded:
            if not encoded:
                raise BadImage("is empty")
            return encoded
        pixels = decode_compact(encoded, self.orientation, self.reduction)
        if pixels.shape[:2] != tuple(-(-side // self.reduction) for side in self.size):
            raise BadImage("has another size than when it was indexed")
        return to_raw(pixels, self.reduction)


def write_pack(
    splits: Mapping[str, Index],
    out: Path,
    *,
    made_from: str,
    config: PackConfig,
    progress: Progress | None = None,
    threads: int | None = None,
) -> PackReport:
    """Pack the images and labels of splits into the file `out`, which is replaced where it is there.

    Equal splits and config give equal bytes, whatever the number of threads. Raises UserError, and writes nothing,
    where an image cannot be read any more, where the disk is full, or where `out` cannot be written.
    """
    _check(splits, config)
    jobs, rows = _jobs(splits, config)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(descriptor, "wb") as stream:
                report = _write(stream, splits, jobs, rows, made_from, config, progress, threads)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(scratch, 0o644)
            os.replace(scratch, out)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        _sync_folder(out.parent)
    except OSError as error:
        raise UserError(
            f"Cannot write {out}: {error.strerror or error}; free some space, or choose another place."
        ) from error
    return report


def _check(splits: Mapping[str, Index], config: PackConfig) -> None:
    """Raise UserError for what cannot be made from these splits."""
    if config.imgsz and not config.decoded:
        raise UserError("imgsz reduces pixels, and without decoded the files are packed as they are; add --decoded.")
    for pack in {index.packed.pack for index in splits.values() if index.packed}:
        if pack.decoded and not config.decoded:
            raise UserError(f"{pack.address} holds pixels and no encoded images; add --decoded.")
        if pack.imgsz and not 0 < config.imgsz <= pack.imgsz:
            raise UserError(
                f"{pack.address} was reduced for imgsz={pack.imgsz}; add --imgsz {pack.imgsz} or less, or pack the "
                "original data set."
            )


def _jobs(splits: Mapping[str, Index], config: PackConfig) -> tuple[list[_Job], dict[str, NDArray[np.int64]]]:
    """List every image once, in the order of splits and rows; and for each split the entries of its rows."""
    jobs: list[_Job] = []
    known: dict[tuple[int, str], int] = {}
    rows: dict[str, NDArray[np.int64]] = {}
    for split, index in splits.items():
        store, packed = store_of(index), index.packed
        reduced = np.ones(len(index), np.int64)
        if config.imgsz:
            reduced = reductions(np.asarray(index.sizes), config.imgsz, dividing=True)
        entries = np.empty(len(index), np.int64)
        for row in range(len(index)):
            key = (0, str(index.path(row))) if packed is None else (1, str(packed.entries[index.origins[row]]))
            entries[row] = known.setdefault(key, len(jobs))
            if entries[row] == len(jobs):
                height, width = index.sizes[row].tolist()
                jobs.append(
                    _Job(
                        store=store,
                        row=row,
                        name=index.paths[row],
                        size=(height, width),
                        orientation=int(index.orientation[row]),
                        reduction=int(reduced[row]),
                    )
                )
        rows[split] = entries
    return jobs, rows


def _write(
    stream: BinaryIO,
    splits: Mapping[str, Index],
    jobs: Sequence[_Job],
    rows: Mapping[str, NDArray[np.int64]],
    made_from: str,
    config: PackConfig,
    progress: Progress | None,
    threads: int | None,
) -> PackReport:
    """Write the whole file."""
    stream.write(bytes(HEADER.itemsize))
    entries = _write_entries(stream, jobs, config, progress, threads)
    _pad(stream, PAGE_BYTES)
    tables_start = stream.tell()
    first = next(iter(splits.values()))
    directory = Directory(
        names=first.names,
        category_ids=tuple(first.category_ids.tolist()),
        format=made_from,
        decoded=config.decoded,
        imgsz=config.imgsz,
        entries={name: _write_column(stream, entries[name], dtype) for name, dtype in ENTRIES.items()},
        splits={
            split: SplitTable(
                num_images=len(index),
                num_boxes=len(index.labels),
                columns=_write_split(stream, index, rows[split], config),
            )
            for split, index in splits.items()
        },
    ).encode()
    directory_start = stream.tell()
    stream.write(directory)
    file_bytes = stream.tell()
    header = Header(
        file_bytes=file_bytes,
        tables_start=tables_start,
        directory_start=directory_start,
        directory_bytes=len(directory),
        directory_checksum=zlib.crc32(directory),
    )
    stream.seek(0)
    stream.write(header.encode())
    return PackReport(
        num_entries=len(jobs),
        num_images=sum(len(index) for index in splits.values()),
        num_boxes=sum(len(index.labels) for index in splits.values()),
        num_bytes=file_bytes,
    )


def _write_entries(
    stream: BinaryIO, jobs: Sequence[_Job], config: PackConfig, progress: Progress | None, threads: int | None
) -> dict[str, NDArray[Any]]:
    """Write all images, made ahead by threads; return their places and checksums."""
    columns = {name: np.zeros(len(jobs), dtype) for name, dtype in ENTRIES.items()}
    broken: list[str] = []

    def made(job: _Job) -> bytes | BadImage:
        try:
            return job.content(config)
        except BadImage as error:
            return error

    threads = threads or min(os.cpu_count() or 1, 8)
    with (
        ThreadPoolExecutor(threads) as pool,
        contextlib.closing(_in_order(pool, made, jobs, _AHEAD_PER_THREAD * threads)) as contents,
    ):
        for number, content in enumerate(contents):
            if isinstance(content, BadImage):
                broken.append(f"\n  {jobs[number].name} {content}")
                if len(broken) >= 5 * MOST_LISTED:
                    break
                continue
            if broken:  # nothing will be written any more; only look for others that are broken
                continue
            _pad(stream, ALIGN_BYTES)
            columns["starts"][number] = stream.tell()
            columns["lengths"][number] = len(content)
            columns["checksums"][number] = zlib.crc32(content)
            stream.write(content)
            if progress:
                progress(number + 1, len(jobs))
    if broken:
        shown = "".join(broken[:MOST_LISTED])
        more = f"\n  and {len(broken) - MOST_LISTED} more" if len(broken) > MOST_LISTED else ""
        raise UserError(
            f"{len(broken):,} of {len(jobs):,} images cannot be packed, so nothing was written; restore them, or take "
            f"them out of the data set:{shown}{more}"
        )
    return columns


def _in_order(
    pool: ThreadPoolExecutor, work: Callable[[_Job], bytes | BadImage], jobs: Iterable[_Job], most: int
) -> Generator[bytes | BadImage, None, None]:
    """Yield the results in the order of the jobs, with at most `most` of them under way or waiting."""
    waiting: deque[Future[bytes | BadImage]] = deque()
    try:
        for job in jobs:
            if len(waiting) == most:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, job))
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _write_split(stream: BinaryIO, index: Index, entries: NDArray[np.int64], config: PackConfig) -> dict[str, Column]:
    """Write the columns of a split."""
    paths = Strings.of(_relative(name) for name in index.paths)
    columns: dict[str, NDArray[Any]] = {
        "paths.blob": paths.blob,
        "paths.offsets": paths.offsets,
        "sizes": index.sizes,
        "orientation": np.ones(len(index)) if config.decoded else index.orientation,
        "offsets": index.offsets,
        "boxes": index.boxes,
        "labels": index.labels,
        "crowd": index.crowd,
        "difficult": index.difficult,
        "area": index.area,
        "image_ids": index.image_ids,
        "entries": entries,
        "polygons.points": index.polygons.points,
        "polygons.rings": index.polygons.rings,
        "polygons.boxes": index.polygons.boxes,
    }
    return {name: _write_column(stream, columns[name], dtype) for name, dtype in COLUMNS.items()}


def _relative(name: str) -> str:
    """Return the name of an image without what leads out of the data set."""
    parts = [part for part in name.split(os.sep) if part not in ("", ".", "..")]
    return "/".join(parts)


def _write_column(stream: BinaryIO, values: NDArray[Any], dtype: str) -> Column:
    _pad(stream, ALIGN_BYTES)
    start = stream.tell()
    content = np.ascontiguousarray(values, dtype)
    data = content.reshape(-1).view(np.uint8).data
    stream.write(data)
    return Column(start=start, dtype=dtype, shape=content.shape, checksum=zlib.crc32(data))


def _pad(stream: BinaryIO, unit: int) -> None:
    stream.write(bytes(-stream.tell() % unit))


def _sync_folder(folder: Path) -> None:
    """Make a new name last, where folders can be synced."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
