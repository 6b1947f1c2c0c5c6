"""Check: what is wrong in a data set, file by file, and what is in it."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from paceline.data.dataset import VAL_SHARE, equal_names, needed_splits, require_divisible, require_usable
from paceline.data.findings import KINDS, ScanReport, printable
from paceline.data.headers import BadImage
from paceline.data.index_cache import scan_or_load
from paceline.data.pack.source import PackSource
from paceline.data.pack.store import store_of
from paceline.data.scan import remarks
from paceline.data.source import recognise
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.data.config import DataConfig
    from paceline.data.findings import Severity
    from paceline.data.index import Index

SMALL_PX2, MEDIUM_PX2 = 32.0**2, 96.0**2
"""Areas in square pixels at which COCO calls a box medium and large."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Shares of the boxes for which their size is reported."""
MOST_HINTS = 20
"""Files that are listed for each kind of finding that may be as it was meant."""
_PAGE_BYTES = 4096

Mark = TypeVar("Mark", int, bytes)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """What one split holds after bad files and boxes are left out."""

    name: str
    """`train`, `val` or `test`."""
    index: Index
    num_boxes: int
    """Boxes to train on; crowd and difficult ones are counted apart."""
    num_crowd: int
    num_difficult: int
    num_without_boxes: int
    """Images without a box to train on."""
    class_boxes: tuple[int, ...]
    """K, boxes of each class."""
    class_images: tuple[int, ...]
    """K, images with each class."""
    most_boxes: int
    """Boxes in the fullest image."""
    image_sizes: tuple[tuple[int, int, int], ...]
    """(height, width, images), the most frequent first."""
    box_sizes_px: tuple[float, ...]
    """Square root of the box area at each of QUANTILES; empty without boxes."""
    area_shares: tuple[float, float, float]
    """Shares of small, medium and large boxes by COCO's bounds, of all boxes that are no crowd or difficult."""


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """The result of a check."""

    source: Path | str
    root: Path
    """Folder that file names in the findings start from."""
    format: str
    names: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    report: ScanReport
    errors: tuple[str, ...]
    """Why this set cannot be trained on; empty if it can."""
    test_errors: tuple[str, ...]
    """Why its test split cannot be evaluated, which no training asks for; empty if it can, or if there is none."""
    divided: bool
    """Whether val is held back from the train images."""
    repeated: tuple[tuple[str, str], ...]
    """Images of equal content in two splits, as (`train: a.jpg`, `val: b.jpg`)."""

    @property
    def usable(self) -> bool:
        """Whether a training on this set would start."""
        return not self.errors

    def format_text(self) -> str:
        """Write the report for a person to read."""
        lines = [f"{self.source} ({self.format}), {len(self.names)} classes", ""]
        lines += [*self._wrong(), ""]
        for split in self.splits:
            lines += _describe(split)
        lines += self._class_table()
        if self.divided:
            lines += ["", f"There is no val: {VAL_SHARE:.0%} of the train images are held back for it, by the seed."]
        if self.repeated:
            lines += [
                "",
                f"{len(self.repeated):,} images are in two splits, so results would look better than they are:",
            ]
            lines += [printable(f"  {first} = {second}") for first, second in self.repeated[:20]]
            if len(self.repeated) > 20:
                lines.append(f"  ... and {len(self.repeated) - 20:,} more")
        return "\n".join(lines)

    def _wrong(self) -> list[str]:
        """List what is wrong, by kind, then what forbids a training."""
        lines = self._list("file", " (left out)") + self._list("box", " (dropped)") + self._list("note", "")
        hints = self._list("hint", "", MOST_HINTS)
        paragraphs = [[f"What is wrong (files are in {self.root}):", *lines]] if lines else []
        if not (lines or self.errors or self.test_errors):
            paragraphs.append(["Nothing is wrong with its files."])
        if hints:
            paragraphs.append([f"What may be meant (files are in {self.root}):", *hints])
        if self.errors:
            paragraphs.append(["No training can start:", *(f"  {error}" for error in self.errors)])
        if self.test_errors:
            paragraphs.append(["test cannot be evaluated:", *(f"  {error}" for error in self.test_errors)])
        return "\n\n".join("\n".join(paragraph) for paragraph in paragraphs).split("\n")

    def _list(self, severity: Severity, done: str, most: int | None = None) -> list[str]:
        """List the findings of a severity by kind, at most `most` of each."""
        lines = []
        for kind, number in self.report.counts.items():
            if KINDS[kind][0] == severity:
                lines.append(f"{KINDS[kind][1]}{done}: {number:,}")
                found = [finding for finding in self.report.findings if finding.kind == kind][:most]
                lines += [f"  {finding}" for finding in found]
                if number > len(found):
                    lines.append(f"  ... and {number - len(found):,} more")
        return lines

    def _class_table(self) -> list[str]:
        """Count boxes per class and split."""
        width = max([5, *(len(name) for name in self.names)])
        lines = [
            "",
            f"{'class':>5}  {'name':<{width}}" + "".join(f"{split.name + ' boxes':>14}" for split in self.splits),
        ]
        for label, name in enumerate(self.names):
            counts = "".join(f"{split.class_boxes[label]:>14,}" for split in self.splits)
            lines.append(f"{label:>5}  {name:<{width}}{counts}")
        return lines if self.splits else []


def check_data(config: DataConfig, *, cache_folder: Path | None = None) -> CheckReport:
    """Look at all splits of the data set that `config.data` names.

    What would stop a training is in the report's `errors`; raises UserError only where nothing can be opened at all.
    """
    source = recognise(config.data, cache_folder)
    divided = "train" in source.splits and "val" not in source.splits
    summaries: list[SplitSummary] = []
    reports: list[ScanReport] = []
    errors, test_errors = list[str](), list[str]()
    for name in source.splits:
        own_errors = test_errors if name == "test" else errors
        try:
            scan = scan_or_load(source, name, cache_folder)
        except UserError as error:
            own_errors.append(str(error))
            continue
        reports.append(scan.report)
        if isinstance(source, PackSource) and source.is_local:
            reports.append(source.verify(name))
        summaries.append(summarise(name, scan.index))
        try:
            require_usable(source, name, scan)
            if divided and name == "train":
                require_divisible(scan.index, str(source.path))
        except UserError as error:
            own_errors.append(str(error).split(":\n", 1)[0])  # the files are listed anyway
    if not summaries:
        raise UserError([*errors, *test_errors][0])
    try:
        needed_splits(source, ("train", "val"))
    except UserError as error:
        errors.append(str(error))
    reports.append(remarks(equal_names(source, summaries[0].index.names)))
    return CheckReport(
        source=source.path,
        root=source.root,
        format=source.format,
        names=summaries[0].index.names,
        splits=tuple(summaries),
        report=ScanReport.join(reports),
        errors=tuple(errors),
        test_errors=tuple(test_errors),
        divided=divided,
        repeated=tuple(_repeated_images(summaries)),
    )


def summarise(name: str, index: Index) -> SplitSummary:
    """Count what an index holds."""
    targets = index.targets
    labels, images = index.labels[targets], index.images_of_boxes[targets]
    num_classes = len(index.names)
    per_image = np.bincount(images, minlength=len(index))
    pairs = np.sort(images * num_classes + labels)  # np.unique is ten times as slow here
    pairs = pairs[np.diff(pairs, prepend=-1) != 0]
    spans = [(index.boxes[:, side + 2] - index.boxes[:, side])[targets] for side in (0, 1)]
    area = index.area[targets]
    shares = [float(np.mean(part)) if len(area) else 0.0 for part in (area < SMALL_PX2, area >= MEDIUM_PX2)]
    return SplitSummary(
        name=name,
        index=index,
        num_boxes=int(targets.sum()),
        num_crowd=int(index.crowd.sum()),
        num_difficult=int(index.difficult.sum()),
        num_without_boxes=int((per_image == 0).sum()),
        class_boxes=tuple(np.bincount(labels, minlength=num_classes).tolist()),
        class_images=tuple(np.bincount(pairs % num_classes, minlength=num_classes).tolist()),
        most_boxes=int(per_image.max(initial=0)),
        image_sizes=_image_sizes(index),
        box_sizes_px=tuple(np.quantile(np.sqrt(spans[0] * spans[1]), QUANTILES).tolist()) if len(area) else (),
        area_shares=(shares[0], 1.0 - sum(shares) if len(area) else 0.0, shares[1]),
    )


def _image_sizes(index: Index) -> tuple[tuple[int, int, int], ...]:
    """Count the images of each (height, width); the most frequent come first, of equal ones that of the first image."""
    packed = index.sizes[:, 0].astype(np.int64) << 32 | index.sizes[:, 1].astype(np.int64)
    sizes, firsts, counts = np.unique(packed, return_index=True, return_counts=True)
    order = np.lexsort((firsts, -counts))
    columns = (sizes[order] >> 32, sizes[order] & 0xFFFFFFFF, counts[order])
    return tuple(zip(*(column.tolist() for column in columns), strict=True))


def _describe(split: SplitSummary) -> list[str]:
    """Write the summary of a split."""
    apart = [(split.num_crowd, "crowd regions"), (split.num_difficult, "difficult boxes")]
    besides = "".join(f", {number:,} {words}" for number, words in apart if number)
    lines = [
        f"{split.name}: {len(split.index):,} images ({split.num_without_boxes:,} without boxes), "
        f"{split.num_boxes:,} boxes{besides}; at most {split.most_boxes:,} in one image"
    ]
    sizes = ", ".join(f"{width} x {height} ({number:,})" for height, width, number in split.image_sizes[:3])
    others = len(split.image_sizes) - 3
    lines.append(f"  image sizes: {sizes}" + (f", and {others:,} other sizes" if others > 0 else ""))
    if split.box_sizes_px:
        sides = ", ".join(f"{side:.0f}" for side in split.box_sizes_px)
        shares = "small {:.0%}, medium {:.0%}, large {:.0%}".format(*split.area_shares)
        quantiles = ", ".join(f"{100 * share:.0f}" for share in QUANTILES)
        lines.append(f"  box sizes (root of the area) at {quantiles} % of the boxes: {sides} px; {shares}")
    return lines


def _repeated_images(splits: list[SplitSummary]) -> list[tuple[str, str]]:
    """Find images of equal content in two splits.

    Only files whose size occurs in several splits are opened, and only those whose middle does, too, are read whole.
    """
    if len(splits) < 2:
        return []
    if splits[0].index.packed:
        return _repeated_entries(splits)
    files = [(split.name, os.path.join(split.index.root, path)) for split in splits for path in split.index.paths]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        suspects, _ = _shared(files, [_file_size(path) for _, path in files])
        suspects, _ = _shared(suspects, list(threads.map(_middle, (path for _, path in suspects))))
        suspects, digests = _shared(suspects, list(threads.map(_digest, (path for _, path in suspects))))
    return _pairs(suspects, digests)


def _repeated_entries(splits: list[SplitSummary]) -> list[tuple[str, str]]:
    """Find images of a pack of equal content in two splits; only those of equal size and checksum are read."""
    found = []
    for split in splits:
        store = store_of(split.index)
        found += [(split.name, path, store, row) for row, path in enumerate(split.index.paths)]
    places: dict[tuple[int, int], set[str]] = {}
    for name, _, store, row in found:
        places.setdefault(store.stamp(row), set()).add(name)
    suspects, digests = [], []
    for name, path, store, row in found:
        if len(places[store.stamp(row)]) > 1:
            with suppress(BadImage):  # which the check has named
                digests.append(_hash(store.read(row)))
                suspects.append((name, path))
    return _pairs(suspects, digests)


def _pairs(suspects: list[tuple[str, str]], digests: list[bytes]) -> list[tuple[str, str]]:
    """Name each (split, path) whose digest an earlier one of another split has, behind that one."""
    first: dict[bytes, tuple[str, str]] = {}
    repeated = []
    for (name, path), digest in zip(suspects, digests, strict=True):
        other, other_path = first.setdefault(digest, (name, path))
        if other != name:
            repeated.append((f"{other}: {os.path.basename(other_path)}", f"{name}: {os.path.basename(path)}"))
    return repeated


def _shared(files: list[tuple[str, str]], marks: list[Mark]) -> tuple[list[tuple[str, str]], list[Mark]]:
    """Return those of some (split, path) whose mark occurs in several splits, and their marks."""
    where: dict[Mark, str] = {}
    several = set()
    for (name, _), mark in zip(files, marks, strict=True):
        if where.setdefault(mark, name) != name:
            several.add(mark)
    chosen = [number for number, mark in enumerate(marks) if mark in several]
    return [files[number] for number in chosen], [marks[number] for number in chosen]


def _file_size(path: str) -> int:
    """Return the size of a file in bytes, -1 where it is gone."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _middle(path: str) -> bytes:
    """Return a hash of a page from the middle of a file; of its name where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as stream:
            stream.seek(os.fstat(stream.fileno()).st_size // 2)
            return _hash(stream.read(_PAGE_BYTES))
    except OSError:
        return os.fsencode(path)


def _digest(path: str) -> bytes:
    """Return a hash of a file's content; of its name where it cannot be read."""
    try:
        with open(path, "rb", buffering=0) as stream:
            return _hash(stream.read())
    except OSError:
        return os.fsencode(path)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
