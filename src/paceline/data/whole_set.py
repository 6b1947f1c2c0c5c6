"""Whole set: all splits of a data set as they are, to be written somewhere else."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.data.dataset import MOST_BAD_FILES, list_findings, log_findings, require_usable
from paceline.data.findings import ScanReport
from paceline.data.index_cache import scan_or_load
from paceline.data.source import recognise
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from paceline.data.index import Index
    from paceline.data.scan import Scan

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class WholeSet:
    """What a data set holds after bad files and boxes are left out."""

    source: Path | str
    format: str
    splits: Mapping[str, Index]
    """At least one; all have the same class names."""

    @property
    def names(self) -> tuple[str, ...]:
        """K class names."""
        return next(iter(self.splits.values())).names


def open_whole_set(data: str, *, splits: Sequence[str] = (), cache_folder: Path | None = None) -> WholeSet:
    """Open the data set that `data` names, with all of its splits, or with those that are named.

    An undivided set stays undivided, with `train` alone. A test split needs no labels, and one whose images are not
    there is left out with a warning, unless it is named. Raises UserError as a training would, and for a named split
    that is not there.
    """
    source = recognise(data, cache_folder)
    missing = [split for split in splits if split not in source.splits]
    if missing:
        raise UserError(f"{source.path} has no {missing[0]} split; it has {', '.join(source.splits)}.")
    chosen = [split for split in source.splits if not splits or split in splits]
    scans: dict[str, Scan] = {}
    for split in chosen:
        try:
            scan = scan_or_load(source, split, cache_folder)
            if scan.report.num_images == 0:
                require_usable(source, split, scan)
        except UserError as error:
            if split != "test" or splits or len(chosen) == 1:
                raise
            log.warning("test is left out: %s", error)
        else:
            scans[split] = scan
    for split, scan in scans.items():
        bad = scan.report.num_bad_files
        if split != "test" or scan.index.targets.any() or not len(scan.index):
            require_usable(source, split, scan)
        elif bad > MOST_BAD_FILES * scan.report.num_images:
            raise UserError(
                f"{source.path} (test): {bad:,} images cannot be used; mend or remove them (in {source.root}):"
                f"{list_findings(scan.report, 'file', bad)}"
            )
    log_findings(source, ScanReport.join(scan.report for scan in scans.values()))
    indexes = {split: scan.index for split, scan in scans.items()}
    assert len({index.names for index in indexes.values()}) == 1
    return WholeSet(source=source.path, format=source.format, splits=indexes)
