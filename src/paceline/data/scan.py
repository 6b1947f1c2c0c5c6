"""Scan: reads all images and label files of a split, in threads, into an index and a report."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from paceline.data.chunks import CHUNK, map_chunks
from paceline.data.findings import KINDS, Finding, FindingCollector, ScanReport
from paceline.data.headers import REFUSED, BadImage, read_header
from paceline.data.index import Index, Strings
from paceline.data.polygons import Polygons
from paceline.data.rows import Rows, clean
from paceline.data.skim import skim_heads

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.headers import Header
    from paceline.data.skim import Heads, PlainLabels
    from paceline.data.stamps import Stamps


class BadLabels(ValueError):  # noqa: N818
    """A label file that cannot be used at all; the message says why and how to mend it."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The files of one split, before any is read."""

    stamps: Stamps
    """Every file that the index depends on."""
    images: list[str] = field(default_factory=list)
    """Absolute paths; empty where only the annotation file knows them (COCO)."""
    labels: list[str] = field(default_factory=list)
    """Absolute path of each image's label file, `""` where it has none."""
    absent: tuple[Finding, ...] = ()
    """Images that are listed, or links, but not there."""
    notes: ScanReport = field(default_factory=ScanReport)
    """What the folders show and no index depends on; it is looked for anew each time, never stored."""


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What a scan gives."""

    index: Index
    report: ScanReport
    outside: Stamps = field(default_factory=dict)
    """Files that it looked for beyond those of the listing; (0, 0) for those that were not there."""


@dataclass(kw_only=True)
class Labels:
    """The boxes of one label file, as they are written."""

    labels: list[int] = field(default_factory=list)
    quads: list[float] = field(default_factory=list)
    """Four numbers per box."""
    lines: list[int] = field(default_factory=list)
    difficult: list[bool] = field(default_factory=list)
    problems: list[tuple[str, int, str]] = field(default_factory=list)
    """(kind of finding, line, message) of what is wrong in it."""
    outlines: dict[int, list[float]] = field(default_factory=dict)
    """By number of the box, the corners x1 y1 x2 y2 ... of its polygon, as shares of the image."""


class LabelReader(Protocol):
    """How a format with one label file per image reads it."""

    def read(self, content: bytes, header: Header) -> Labels:
        """Parse a file; raises BadLabels where it is unusable."""

    def skim(self, paths: Sequence[str]) -> PlainLabels:
        """Read those of many files that are plain, to the same boxes as `read`; it may set all aside."""

    def place(
        self, quads: NDArray[np.float64], sizes: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Turn quads M4 into xyxy pixels of images of `sizes` M2; the mask M marks those out of the format's range."""

    def range_message(self, quad: NDArray[np.float64]) -> str:
        """Say what is wrong with a quad that `place` marked."""


class Source(Protocol):
    """A data set of one format: it knows its splits, lists their files and scans them."""

    @property
    def path(self) -> Path | str:
        """File, folder or address that the user named."""

    @property
    def root(self) -> Path:
        """Folder that paths in the index start from."""

    @property
    def format(self) -> str:
        """`YOLO`, `COCO`, `Pascal VOC` or `pack`."""

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of train, val and test that it has; an undivided set has train alone."""

    def identity(self) -> tuple[str, ...]:
        """Everything besides files that an index depends on."""

    def list_files(self, split: str) -> Listing:
        """Find the files of a split; raises UserError where the user's paths lead nowhere."""

    def scan(self, split: str, listing: Listing) -> Scan:
        """Read the files of a split; bad ones are left out and reported."""

    def missing(self, split: str) -> str:
        """Say what the user named for a split and is not there; empty where all of it is. No file is opened."""

    def where_labels_are(self, split: str) -> str:
        """Say where the labels of a split are looked for, and in what form."""


@dataclass(frozen=True, kw_only=True)
class Images:
    """Those of some images that can be read."""

    kept: NDArray[np.int64]
    """N, their numbers among those given."""
    sizes: NDArray[np.int32]
    """N2, height and width."""
    orientation: NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class _Part:
    images: Images
    rows: Rows
    report: ScanReport


def shown(path: str, root: str) -> str:
    """Name a file for the user: relative to the data set where it lies in it."""
    return path.removeprefix(root.rstrip(os.sep) + os.sep)


def scan_pairs(listing: Listing, root: Path, names: Sequence[str], reader: LabelReader) -> Scan:
    """Scan a split of images with one label file each."""
    pairs = list(zip(listing.images, listing.labels, strict=True))
    parts = map_chunks(lambda chunk: _scan_part(chunk, str(root), len(names), reader), pairs)
    images = join_images(part.images for part in parts)
    firsts = np.concatenate([[0], np.cumsum([len(part.images.kept) for part in parts])])[:-1]
    rows = Rows.join([part.rows for part in parts], [int(first) for first in firsts])
    report = ScanReport.join([absence(listing.absent), *(part.report for part in parts)])
    paths = [shown(listing.images[row], str(root)) for row in images.kept.tolist()]
    return Scan(index=make_index(names, root, paths, images, rows), report=report)


def scan_headers(paths: Sequence[str], root: Path) -> tuple[Images, ScanReport]:
    """Read the headers of many images."""

    def work(chunk: Sequence[str]) -> tuple[Images, ScanReport]:
        collector = FindingCollector()
        heads, bad = _read_heads(chunk)
        for number, reason in bad.items():
            collector.add("image", shown(chunk[number], str(root)), 0, reason)
        return _images(heads, heads.marks > 0), _report(collector, len(chunk), 0)

    parts = map_chunks(work, paths)
    return join_images(images for images, _ in parts), ScanReport.join(report for _, report in parts)


def join_images(parts: Iterable[Images]) -> Images:
    """Put the parts that `map_chunks` made after each other, their numbers counted on."""
    parts = tuple(parts)
    return Images(
        kept=np.concatenate([np.zeros(0, np.int64), *(part.kept + CHUNK * k for k, part in enumerate(parts))]),
        sizes=np.concatenate([np.zeros((0, 2), np.int32), *(part.sizes for part in parts)]),
        orientation=np.concatenate([np.zeros(0, np.uint8), *(part.orientation for part in parts)]),
    )


def make_index(
    names: Sequence[str],
    root: Path,
    paths: Sequence[str],
    images: Images,
    rows: Rows,
    *,
    image_ids: NDArray[np.int64] | None = None,
    category_ids: NDArray[np.int64] | None = None,
) -> Index:
    """Put checked rows into the order of their images."""
    if np.any(np.diff(rows.images) < 0):
        rows = rows.select(np.argsort(rows.images, kind="stable"))
    counts = np.bincount(rows.images, minlength=len(paths))
    return Index(
        names=tuple(names),
        root=root,
        paths=Strings.of(paths),
        sizes=images.sizes,
        orientation=images.orientation,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)]),
        boxes=rows.boxes,
        labels=rows.labels.astype(np.int32),
        crowd=rows.crowd,
        difficult=rows.difficult,
        area=rows.area,
        image_ids=np.arange(len(paths)) if image_ids is None else image_ids,
        category_ids=np.arange(len(names)) if category_ids is None else category_ids,
        origins=np.arange(len(paths)),
        polygons=rows.polygons,
    )


def absence(findings: Sequence[Finding]) -> ScanReport:
    """Report images that are listed, or links, but not there."""
    return dataclasses.replace(remarks(findings), num_images=len(findings))


def dangling_links(links: Sequence[str], root: str) -> list[Finding]:
    """Name images that are links to nothing."""
    message = "is a link to nothing; restore what it points at, or remove it"
    return [Finding(kind="absent", file=shown(link, root), line=0, message=message) for link in links]


def shared_labels(images: Sequence[str], labels: Sequence[str], root: str) -> list[Finding]:
    """Name label files that belong to several images, such as a.jpg and a.png; `labels` has that of each, or `""`."""
    images_of: dict[str, list[str]] = {}
    several = {label for label, number in Counter(labels).items() if label and number > 1}
    for image, label in zip(images, labels, strict=True) if several else ():
        if label in several:
            images_of.setdefault(label, []).append(os.path.basename(image))
    return [
        Finding(
            kind="shared",
            file=shown(label, root),
            line=0,
            message=f"belongs to {', '.join(names[:-1])} and {names[-1]} alike; remove all but one, or rename them",
        )
        for label, names in images_of.items()
    ]


def remarks(findings: Sequence[Finding], unlisted: Sequence[str] = (), lists: str = "") -> ScanReport:
    """Report what belongs to no image, and images that none of `lists`, which are named in words, has."""
    collector = FindingCollector()
    for finding in findings:
        collector.add(finding.kind, finding.file, finding.line, finding.message)
    collector.add_files("unlisted", unlisted, f"is in none of {lists}; add it to one to use it")
    return _report(collector, 0, 0)


def _scan_part(pairs: Sequence[tuple[str, str]], root: str, num_classes: int, reader: LabelReader) -> _Part:
    """Read some images, each with its label file, then check all boxes at once."""
    collector = FindingCollector()
    heads, bad = _read_heads([image for image, _ in pairs])
    labelled = [number for number, (_, label) in enumerate(pairs) if label and heads.marks[number]]
    plain = reader.skim([pairs[number][1] for number in labelled])
    aside = {labelled[place] for place in np.flatnonzero(~plain.plain)}
    kept = heads.marks > 0
    found: dict[int, Labels] = {}
    for number in sorted(aside | bad.keys()):
        image, label = pairs[number]
        if number in bad:
            collector.add("image", shown(image, root), 0, bad[number])
            continue
        try:
            found[number] = reader.read(_content(label), heads.header(number))
        except BadLabels as error:
            collector.add("label", shown(label, root), 0, str(error))
            kept[number] = False
            continue
        for kind, line, message in found[number].problems:
            collector.add(kind, shown(label, root), line, message)
    images = _images(heads, kept)
    row_of = np.cumsum(kept) - 1  # of each of `pairs` among the images that are kept

    def file_of(row: int) -> str:
        return shown(pairs[images.kept[row]][1], root)

    plain_rows = row_of[np.array(labelled, np.int64)[plain.files]]
    own = {int(row_of[number]): entries for number, entries in found.items()}
    rows, outside = _rows(plain, plain_rows, own, images.sizes, reader, file_of, collector)
    malformed = sum(KINDS[kind][0] == "box" for entries in found.values() for kind, _, _ in entries.problems)
    num_boxes = malformed + outside + len(rows)
    rows = clean(rows, images.sizes, num_classes, file_of, collector)
    without = [shown(image, root) for (image, label), used in zip(pairs, kept, strict=True) if used and not label]
    collector.add_files("unlabelled", without, "has no label file, so it counts as an image without objects")
    return _Part(images=images, rows=rows, report=_report(collector, len(pairs), num_boxes))


def _rows(
    plain: PlainLabels,
    plain_rows: NDArray[np.int64],
    found: Mapping[int, Labels],
    sizes: NDArray[np.int32],
    reader: LabelReader,
    file_of: Callable[[int], str],
    collector: FindingCollector,
) -> tuple[Rows, int]:
    """Bring the boxes of label files into pixels; return them, and the number of those that were out of range.

    `plain_rows` M are the images of the boxes in `plain`; `found` holds the other files by the row of their image.
    """
    counts = [len(entries.labels) for entries in found.values()]
    quads = np.array([value for entries in found.values() for value in entries.quads], np.float64).reshape(-1, 4)
    lines = np.array([line for entries in found.values() for line in entries.lines], np.int64)
    labels = np.array([label for entries in found.values() for label in entries.labels], np.int64)
    flags = np.array([flag for entries in found.values() for flag in entries.difficult], np.bool_)
    number = len(plain.files) + len(lines)
    rows = Rows(
        images=np.concatenate([plain_rows, np.repeat(np.array(list(found), np.int64), counts)]),
        lines=np.concatenate([plain.lines, lines]),
        labels=np.concatenate([plain.labels, labels]),
        boxes=np.concatenate([plain.quads, quads]),
        crowd=np.zeros(number, np.bool_),
        difficult=np.concatenate([np.zeros(len(plain.files), np.bool_), flags]),
        area=np.full(number, np.nan),
        polygons=Polygons.join([Polygons.none(), _polygons(found, sizes)], [len(plain.files), len(lines)]),
    )
    if found:
        rows = rows.select(np.argsort(rows.images, kind="stable"))
    quads = rows.boxes
    boxes, out_of_range = reader.place(quads, sizes[rows.images])
    for place in np.flatnonzero(out_of_range):
        message = reader.range_message(quads[place])
        collector.add("range", file_of(int(rows.images[place])), int(rows.lines[place]), message)
    rows = dataclasses.replace(rows, boxes=boxes)
    return rows.select(~out_of_range) if out_of_range.any() else rows, int(out_of_range.sum())


def _polygons(found: Mapping[int, Labels], sizes: NDArray[np.int32]) -> Polygons:
    """Bring the polygons of the boxes of label files, by the row of their image, into pixels; `sizes` N2."""
    if not any(entries.outlines for entries in found.values()):
        return Polygons.none()
    return Polygons.of(
        [np.reshape(entries.outlines[number], (-1, 2)) * sizes[row, ::-1]] if number in entries.outlines else []
        for row, entries in found.items()
        for number in range(len(entries.labels))
    )


def _read_heads(paths: Sequence[str]) -> tuple[Heads, dict[int, str]]:
    """Read the headers of images; the marks of those that cannot be read stay 0, and their numbers have a reason."""
    heads = skim_heads(paths)
    bad: dict[int, str] = {}
    for number in np.flatnonzero(heads.marks == 0).tolist():
        try:
            heads.set_header(number, read_header(paths[number]))
        except BadImage as error:
            bad[number] = str(error)
    return heads, bad


def _content(path: str) -> bytes:
    """Read a label file."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return stream.read()
    except OSError as error:
        raise BadLabels(f"cannot be read ({error.strerror}); {REFUSED}") from error


def _images(heads: Heads, kept: NDArray[np.bool_]) -> Images:
    """Gather the headers of the images that are kept."""
    return Images(kept=np.flatnonzero(kept), sizes=heads.sizes[kept], orientation=heads.orientation[kept])


def _report(collector: FindingCollector, num_images: int, num_boxes: int) -> ScanReport:
    """Freeze what was collected."""
    return ScanReport(
        num_images=num_images,
        num_boxes=num_boxes,
        counts=dict(collector.counts),
        findings=tuple(collector.findings),
    )
