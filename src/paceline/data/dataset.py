"""Data set: the indexes of train, val and test, with everything applied that the user asked for."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.findings import Finding, ScanReport
from paceline.data.index_cache import scan_or_load
from paceline.data.pack.source import PackSource
from paceline.data.source import recognise
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.config import DataConfig
    from paceline.data.index import Index
    from paceline.data.scan import Scan, Source

VAL_SHARE = 0.1
"""Share of the images that is held back for validation where a set has no split."""
MOST_BAD_FILES = 0.1
"""Share of bad files above which nothing is trained."""
MOST_SHOWN = 20
"""Findings that an error message lists."""
SINGLE_CLASS_NAME = "object"
"""Name of the class that `single_cls` makes of all."""

_log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True, eq=False)
class DataSet:
    """What can be trained and evaluated on."""

    names: tuple[str, ...]
    """K class names."""
    train: Index | None
    val: Index | None
    test: Index | None
    report: ScanReport
    """What was wrong in the splits that were opened."""
    source: Path | str
    """File, folder or address that the set was opened from."""
    format: str
    """`YOLO`, `COCO`, `Pascal VOC` or `pack`."""
    divided: bool
    """True where the set has no `val` of its own, so that the seed divided its images into `train` and `val`."""


def open_data_set(
    config: DataConfig, *, seed: int, cache_folder: Path | None = None, splits: Sequence[str] = ("train", "val")
) -> DataSet:
    """Open `splits` of the data set that `config.data` names; the others are None.

    A set without `val` is divided by `seed`, 90 to 10, into train and val. `fraction` applies to train alone. Raises
    UserError for what cannot be mended by leaving it out; bad files and boxes are left out, logged and reported.
    """
    _check_options(config)
    source = recognise(config.data, cache_folder)
    if isinstance(source, PackSource):
        source.require_imgsz(config.imgsz)
    needed = needed_splits(source, splits)
    for name in source.splits:
        missing = source.missing(name) if name not in needed else ""
        if missing:
            _log.warning("%s is left out, which nothing here needs: %s", name, missing)
    scans = {name: scan_or_load(source, name, cache_folder) for name in needed}
    for name, scan in scans.items():
        require_usable(source, name, scan)
    report = ScanReport.join(scan.report for scan in scans.values())
    log_findings(source, report)
    indexes = {name: _choose_classes(scan.index, config) for name, scan in scans.items()}
    for name, index in indexes.items():
        _require_boxes(index, source, name, config)
    divided = "val" not in source.splits and "train" in indexes and not {"train", "val"}.isdisjoint(splits)
    if divided:
        indexes["train"], indexes["val"] = divide(indexes["train"], seed, str(source.path))
        _log.info(
            "%s has no validation images of its own: seed %d divides its images into %d for train and %d for val.",
            source.path,
            seed,
            len(indexes["train"]),
            len(indexes["val"]),
        )
    if config.fraction < 1 and "train" in indexes:
        indexes["train"] = _thin(indexes["train"], config.fraction, seed)
    if not divided and "train" in indexes and "val" in indexes:
        _warn_of_shared(indexes["train"], indexes["val"])
    names = next(iter(indexes.values())).names
    for finding in equal_names(source, names):
        _log.warning("%s", finding)
    assert all(index.names == names for index in indexes.values())
    chosen = {name: indexes.get(name) if name in splits else None for name in ("train", "val", "test")}
    return DataSet(names=names, report=report, source=source.path, format=source.format, divided=divided, **chosen)


def equal_names(source: Source, names: Sequence[str]) -> list[Finding]:
    """Name the classes of a set that are called the same: each is a class of its own, but no table tells them apart."""
    labels_of: dict[str, list[str]] = {}
    for label, name in enumerate(names):
        labels_of.setdefault(name, []).append(str(label))
    return [
        Finding(
            kind="name",
            file=str(source.path),
            line=0,
            message=f"classes {', '.join(labels[:-1])} and {labels[-1]} have one name, {name}; give each its own name",
        )
        for name, labels in labels_of.items()
        if len(labels) > 1
    ]


def _warn_of_shared(train: Index, val: Index) -> None:
    """Say how many images of val are trained on, by their paths; `paceline data check` looks at what they hold."""
    if train.root != val.root or train.packed is not None:  # entries of a pack have names of their own in each split
        return
    held = set(val.paths)
    shared = sum(path in held for path in train.paths)
    if shared:
        _log.warning(
            "%s of the %s images in val are in train too, so figures will look better than they are.",
            f"{shared:,}",
            f"{len(val):,}",
        )


def require_usable(source: Source, split: str, scan: Scan) -> None:
    """Raise UserError where a scan leaves too little: too many bad files, no image, or no box at all."""
    report, index = scan.report, scan.index
    place = f"{source.path} ({split})"
    bad, total = report.num_bad_files, report.num_images
    if total == 0:
        raise UserError(f"{place}: no images are listed; add some, or correct the path.")
    if bad > MOST_BAD_FILES * total:
        raise UserError(
            f"{place}: {bad:,} of {total:,} images cannot be used, more than {MOST_BAD_FILES:.0%}; mend or remove "
            f"these files (in {source.root}):{list_findings(report, 'file', bad)}"
        )
    if not index.targets.any():
        wrong = report.num_bad_boxes
        if wrong:
            raise UserError(
                f"{place}: none of its {wrong:,} boxes can be used; correct them (in {source.root}):"
                f"{list_findings(report, 'box', wrong)}"
            )
        raise UserError(
            f"{place}: none of its {len(index):,} images has a label; they are looked for in "
            f"{source.where_labels_are(split)}; put them there, or correct the path."
        )


def list_findings(report: ScanReport, severity: str, total: int) -> str:
    """Return the first findings of a severity, one per line, and how many more there are."""
    assert severity in ("file", "box", "note")
    shown = report.of(severity)[:MOST_SHOWN]  # type: ignore[arg-type]
    lines = [f"\n  {finding}" for finding in shown]
    if total > len(shown):
        lines.append(f"\n  ... and {total - len(shown):,} more; `paceline data check` lists them.")
    return "".join(lines)


def divide(index: Index, seed: int, name: str = "the data set") -> tuple[Index, Index]:
    """Divide an index by `seed` into 90 and 10 parts of 100, images with and without boxes each in this proportion."""
    require_divisible(index, name)
    held: list[NDArray[np.int64]] = []
    random = np.random.default_rng((seed, 0x5EED))
    labelled = _has_targets(index)
    for group in (np.flatnonzero(labelled), np.flatnonzero(~labelled)):
        least = 1 if labelled[group].any() else 0
        held.append(random.permutation(group)[: max(round(len(group) * VAL_SHARE), least)])
    val = np.sort(np.concatenate(held))
    train = np.setdiff1d(np.arange(len(index)), val)
    assert labelled[train].any()
    return index.select_images(train), index.select_images(val)


def require_divisible(index: Index, name: str) -> None:
    """Raise UserError where train and val cannot both have an image with boxes."""
    if _has_targets(index).sum() < 2:
        raise UserError(
            f"{name} has a single image with boxes, which cannot be divided into train and val; add images, "
            "or name a validation split."
        )


def _check_options(config: DataConfig) -> None:
    """Raise UserError for options out of their range."""
    if not 0 < config.fraction <= 1:
        raise UserError(f"fraction is {config.fraction}; give a share above 0, at most 1.")


def needed_splits(source: Source, splits: Sequence[str]) -> list[str]:
    """Return the splits to scan: those asked for, train standing in for a val that the set does not have.

    Raises UserError where the set has not got one.
    """
    needed: list[str] = []
    for split in splits:
        assert split in ("train", "val", "test")
        stand_in = "train" if split == "val" and "val" not in source.splits else split
        if stand_in not in source.splits:
            raise UserError(
                f"{source.path} has no {split} split (it has {', '.join(source.splits)}); add one, or choose another."
            )
        if stand_in not in needed:
            needed.append(stand_in)
    return needed


def _choose_classes(index: Index, config: DataConfig) -> Index:
    """Apply `classes`, then `single_cls`."""
    num_classes = len(index.names)
    for label in config.classes:
        if not 0 <= label < num_classes:
            raise UserError(
                f"classes names {label}, but the set has {num_classes} classes (0 to {num_classes - 1}); correct it."
            )
    if config.classes:
        index = index.select_boxes(np.isin(index.labels, config.classes))
    if config.single_cls and num_classes > 1:
        index = dataclasses.replace(
            index,
            names=(SINGLE_CLASS_NAME,),
            labels=np.zeros_like(index.labels),
            category_ids=np.zeros(1, np.int64),
        )
    return index


def _require_boxes(index: Index, source: Source, split: str, config: DataConfig) -> None:
    """Raise UserError where `classes` leaves no box."""
    if config.classes and not index.targets.any():
        chosen = ", ".join(str(label) if config.single_cls else index.names[label] for label in config.classes)
        raise UserError(f"{source.path} ({split}) has no box of the chosen classes ({chosen}); choose others.")


def _thin(index: Index, fraction: float, seed: int) -> Index:
    """Keep a share of the images, drawn by `seed`, at least one of them with boxes."""
    order = np.random.default_rng((seed, 0xF4AC)).permutation(len(index))
    number = max(1, round(len(index) * fraction))
    chosen = order[:number]
    labelled = _has_targets(index)
    if not labelled[chosen].any():
        chosen[-1] = order[np.argmax(labelled[order])]
    return index.select_images(np.sort(chosen))


def _has_targets(index: Index) -> NDArray[np.bool_]:
    """N, True for images that have a box to train on."""
    counts = np.bincount(index.images_of_boxes[index.targets], minlength=len(index))
    labelled: NDArray[np.bool_] = counts > 0
    return labelled


def log_findings(source: Source, report: ScanReport) -> None:
    """Say once what was left out."""
    if report.num_bad_files or report.num_bad_boxes:
        _log.warning(
            "%s: %d images left out, %d boxes dropped (%s); `paceline data check %s` lists them.",
            source.path,
            report.num_bad_files,
            report.num_bad_boxes,
            report.summary(),
            source.path,
        )
    elif report.counts:
        _log.info("%s: %s.", source.path, report.summary())
