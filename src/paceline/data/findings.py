"""Findings: what a scan of a data set found wrong, where, and what was done about it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

Severity = Literal["file", "box", "note", "hint"]

KINDS: dict[str, tuple[Severity, str]] = {
    "image": ("file", "images that cannot be read"),
    "absent": ("file", "images that are listed or linked but not there"),
    "label": ("file", "label files that cannot be read"),
    "line": ("box", "entries that are no box"),
    "class": ("box", "boxes of a class that is not in the list"),
    "number": ("box", "boxes with NaN or infinite numbers"),
    "degenerate": ("box", "boxes without an area"),
    "range": ("box", "boxes outside their image"),
    "duplicate": ("note", "boxes given twice (counted once)"),
    "clipped": ("note", "boxes that reach outside their image (clipped)"),
    "shared": ("note", "label files that several images share"),
    "name": ("note", "class names given twice"),
    "twice": ("note", "images listed under several ids (each counts)"),
    "size": ("note", "images whose size differs from the annotation"),
    "unpaired": ("note", "label files without an image"),
    "unlabelled": ("hint", "images without labels (used as background)"),
    "unlisted": ("hint", "images that nothing lists (not used)"),
}
"""Each kind of finding, and its name in words: a bad file is left out, a bad box is dropped, a note changes little, and
behind a hint nothing need be wrong."""

_ENTRIES = {".xml": ", object ", ".json": ", annotation "}

MOST_PER_KIND = 1000
"""Findings of one kind that are kept in words; the others are only counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: str
    """Key of KINDS."""
    file: str
    """The file, as the user would name it."""
    line: int
    """Line of a text file, object of a VOC file or annotation of a COCO file, from 1; 0 where the file is meant."""
    message: str
    """What is wrong and how to mend it, without the file."""

    def __str__(self) -> str:
        entry = _ENTRIES.get(os.path.splitext(self.file)[1].lower(), ":")
        place = f"{self.file}{entry}{self.line}" if self.line else self.file
        return printable(f"{place}: {self.message}")


def printable(text: str) -> str:
    r"""Write bytes of file names that are no UTF-8 as `\xe9`: no terminal or file would take the text as it is.

    JSON may also hold halves of characters that stand for no byte; a text with one of them has all written as `\ud800`.
    """
    try:
        content = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        content = text.encode("utf-8", "backslashreplace")
    return content.decode("utf-8", "backslashreplace")


class FindingCollector:
    """Findings while they come in, counted per kind."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.findings: list[Finding] = []

    def add(self, kind: str, file: str, line: int, message: str) -> None:
        """Count one finding, and keep it if there is room."""
        assert kind in KINDS, kind
        self.counts[kind] += 1
        if self.counts[kind] <= MOST_PER_KIND:
            self.findings.append(Finding(kind=kind, file=file, line=line, message=message))

    def add_files(self, kind: str, files: Sequence[str], message: str) -> None:
        """Count the same finding for many files, and keep as many as there is room for."""
        for file in files[:MOST_PER_KIND]:
            self.add(kind, file, 0, message)
        self.counts[kind] += max(len(files) - MOST_PER_KIND, 0)


@dataclass(frozen=True, kw_only=True)
class ScanReport:
    """What was wrong in a scan; images and boxes are those that the files named, bad ones among them."""

    num_images: int = 0
    num_boxes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    """Number of findings per kind."""
    findings: tuple[Finding, ...] = ()
    """The findings, at most MOST_PER_KIND of a kind."""

    @classmethod
    def join(cls, reports: Iterable[ScanReport]) -> ScanReport:
        """Add reports up, in order."""
        reports = tuple(reports)
        counts: Counter[str] = Counter()
        findings: list[Finding] = []
        kept: Counter[str] = Counter()
        for report in reports:
            counts.update(report.counts)
            for finding in report.findings:
                kept[finding.kind] += 1
                if kept[finding.kind] <= MOST_PER_KIND:
                    findings.append(finding)
        return cls(
            num_images=sum(report.num_images for report in reports),
            num_boxes=sum(report.num_boxes for report in reports),
            counts={kind: counts[kind] for kind in KINDS if counts[kind]},
            findings=tuple(findings),
        )

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(number for kind, number in self.counts.items() if KINDS[kind][0] == severity)

    @property
    def num_bad_files(self) -> int:
        """Images that were left out."""
        return self.count("file")

    @property
    def num_bad_boxes(self) -> int:
        """Boxes that were dropped."""
        return self.count("box")

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of a severity."""
        return tuple(finding for finding in self.findings if KINDS[finding.kind][0] == severity)

    def summary(self) -> str:
        """Say in one line what was found, such as `boxes without an area: 2`; empty if nothing."""
        return "; ".join(f"{KINDS[kind][1]}: {number:,}" for kind, number in self.counts.items())
