"""Index cache: keeps the scan of a split beside the data, or in the cache folder where that is read-only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.data import cache_folder as package_cache
from paceline.data.findings import Finding, ScanReport
from paceline.data.headers import REFUSED
from paceline.data.index import Index, OtherVersionError, TornIndexError
from paceline.data.pack.source import PackSource
from paceline.data.scan import Scan
from paceline.data.stamps import fingerprint, stamp_file
from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.data.scan import Listing, Source
    from paceline.data.stamps import Stamps

FOLDER = ".paceline"
"""Folder beside the data."""
_RECIPE = "6"
"""Goes up whenever the same files would give another index, or another report."""

_MANY = 20_000
"""Images from which on a scan is announced: on a slow disk it takes minutes."""

_log = logging.getLogger("paceline")


def scan_or_load(source: Source, split: str, cache_folder: Path | None = None) -> Scan:
    """Return the scan of a split: a stored one where no file has changed since, else a new one, which is stored.

    The stored file is `.paceline/<name>-<split>.safetensors` in the set's folder, or lies in `cache_folder` (the
    package's own if None). A pack is its own index. A damaged file is built again, and a scan that was refused a
    file is not stored. Raises UserError where the user's paths lead nowhere.
    """
    listing = source.list_files(split)
    if isinstance(source, PackSource):
        return source.scan(split, listing)
    _require_images(source, split, listing)
    state = fingerprint(str(source.root), listing.stamps, (_RECIPE, source.format, split, *source.identity()))
    places = _places(source, split, cache_folder)
    for place in places:
        stored = _load(place, source.root, state)
        if stored:
            return _remark(stored, listing)
    if len(listing.images) >= _MANY:
        _log.info("Reading %s images and labels of %s (%s), once.", f"{len(listing.images):,}", source.path, split)
    scan = source.scan(split, listing)
    if _lasts(scan.report):
        _store(places, scan, source.root, state)
    return _remark(scan, listing)


def _remark(scan: Scan, listing: Listing) -> Scan:
    """Add what the listing shows, which is never stored."""
    if not listing.notes.counts:
        return scan
    return dataclasses.replace(scan, report=ScanReport.join([scan.report, listing.notes]))


def _require_images(source: Source, split: str, listing: Listing) -> None:
    """Raise UserError where a split names no file at all."""
    if not listing.images and not listing.absent and source.format != "COCO":
        raise UserError(
            f"{source.path}: no images found for {split}; put .jpg, .png, .bmp, .webp or .tiff files there, "
            "or correct the path."
        )


def _places(source: Source, split: str, cache_folder: Path | None) -> tuple[Path, ...]:
    """Return where a stored scan may lie, best first; a folder without any right to write is left alone."""
    name = f"{Path(source.path).stem}-{split}.safetensors"
    key = hashlib.blake2b(os.fsencode(source.path), digest_size=6).hexdigest()
    central = (cache_folder or package_cache.cache_folder()) / "indexes" / f"{key}-{name}"
    root = source.root
    writable = os.access(root, os.W_OK) and root.stat().st_mode & 0o222
    return (root / FOLDER / name, central) if writable else (central,)


def _load(place: Path, root: Path, state: str) -> Scan | None:
    """Read a stored scan; None where there is none, it is damaged or of another version, or files have changed."""
    try:
        index, notes = Index.load(place, root)
        if notes.get("fingerprint") != state:
            return None
        outside = _outside(notes, root)
        if outside is None:
            return None
        report = _report_of(json.loads(notes["report"]))
        return Scan(index=index, report=report, outside=outside) if _lasts(report) else None
    except (FileNotFoundError, OtherVersionError):
        return None
    except (TornIndexError, OSError, KeyError, ValueError, TypeError) as error:
        _log.warning("The stored index %s is damaged (%s); it is built again.", place, error)
        return None


def _lasts(report: ScanReport) -> bool:
    """Tell whether a scan stays true until a file changes: not where one could not be opened, which no stamp tells."""
    return not any(finding.message.endswith(REFUSED) for finding in report.findings)


def _outside(notes: dict[str, str], root: Path) -> Stamps | None:
    """Stamp anew the files that a stored scan had looked for elsewhere; None where one has changed."""
    if "outside" not in notes:
        return {}
    folders: dict[str, list[str]] = json.loads(notes["outside"])
    found = {path: stamp_file(path) for folder, names in folders.items() for path in _joined(folder, names)}
    return found if fingerprint(os.sep, found, (str(root),)) == notes["outside_fingerprint"] else None


def _joined(folder: str, names: list[str]) -> list[str]:
    return [os.path.join(folder, name) for name in names]


def _store(places: tuple[Path, ...], scan: Scan, root: Path, state: str) -> None:
    """Write a scan to the first place that takes it; where none does, the next run scans again."""
    notes = {"fingerprint": state, "report": json.dumps(asdict(scan.report))}
    if scan.outside:  # by folder, whose name so is written once
        folders: dict[str, list[str]] = {}
        for path in scan.outside:
            folder, name = os.path.split(path)
            folders.setdefault(folder, []).append(name)
        ordered = {path: scan.outside[path] for folder, names in folders.items() for path in _joined(folder, names)}
        notes["outside"] = json.dumps(folders)
        notes["outside_fingerprint"] = fingerprint(os.sep, ordered, (str(root),))
    for place in places:
        try:
            scan.index.save(place, notes)
            return
        except UserError as error:
            reason = error
    _log.warning("The index cannot be stored, so the next run reads all files again: %s", reason)


def _report_of(content: dict[str, object]) -> ScanReport:
    """Rebuild a report from JSON."""
    findings = content.pop("findings")
    assert isinstance(findings, list)
    return ScanReport(findings=tuple(Finding(**finding) for finding in findings), **content)  # type: ignore[arg-type]
