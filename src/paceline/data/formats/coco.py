"""COCO format: JSON files of all boxes, and folders of images.

Three ways to name a set: a folder in the published layout (`annotations/instances_train2017.json`,
`annotations/instances_val2017.json`, images in `train2017` and `val2017`, with or without `images/` before them; or
one `instances.json` beside `images`); one JSON file; or a yaml file such as

```yaml
path: coco                                              # optional; else the folder of this file
train: {annotations: annotations/train.json, images: photos/train}
val: {annotations: annotations/val.json, images: photos/val}
```
"""

from __future__ import annotations

import itertools
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.findings import FindingCollector, ScanReport
from paceline.data.formats.coco_file import NO_ID, CocoFile
from paceline.data.formats.coco_images import find_images, places_of
from paceline.data.formats.yaml_file import SPLITS, entry_of, names_of, root_of, spellings
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.near_names import no_such_path
from paceline.data.rows import Rows, clean
from paceline.data.scan import Images, Listing, Scan, absence, make_index, remarks, scan_headers, shown
from paceline.data.stamps import stamp, walk
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


_ROBOFLOW = "_annotations.coco.json"

log = logging.getLogger("paceline")


@dataclass(frozen=True, kw_only=True)
class CocoPart:
    """One split: its annotation file and the folder of its images."""

    annotations: Path
    images: Path


@dataclass(frozen=True, kw_only=True)
class CocoSource:
    """A data set of annotation files."""

    path: Path
    root: Path
    parts: Mapping[str, CocoPart]
    names: tuple[str, ...] | None = None
    """Names that the user's yaml gives besides; they must agree with the categories."""
    _files: dict[Path, CocoFile] = field(default_factory=dict, repr=False)
    _unreadable: set[Path] = field(default_factory=set, repr=False)

    format = "COCO"

    @classmethod
    def recognise(cls, folder: Path) -> CocoSource | None:
        """Return the source if the folder looks like one of this format.

        Raises UserError where several annotation files could be meant.
        """
        for place in (folder / "annotations", folder):
            files = sorted(place.glob("*.json")) if place.is_dir() else []
            chosen = _choose(files, folder, sure=place != folder)
            if chosen:
                parts = {split: CocoPart(annotations=file, images=_images_of(file)) for split, file in chosen.items()}
                return cls(path=folder, root=folder, parts=parts)
        exported = {
            split: folder / name / _ROBOFLOW
            for name, split in (("train", "train"), ("valid", "val"), ("val", "val"), ("test", "test"))
            if (folder / name / _ROBOFLOW).is_file()
        }
        parts = {split: CocoPart(annotations=file, images=file.parent) for split, file in exported.items()}
        return cls(path=folder, root=folder, parts=parts) if parts else None

    @classmethod
    def of_json(cls, file: Path) -> CocoSource:
        """Take one annotation file as an undivided set."""
        images = _images_of(file)
        parent = file.parent
        root = parent.parent if parent.name == "annotations" else parent
        return cls(path=file, root=root, parts={"train": CocoPart(annotations=file, images=images)})

    @classmethod
    def of_yaml(cls, path: Path, content: Mapping[str, object]) -> CocoSource | None:
        """Return the source if a yaml names annotation files; raises UserError where it names them by halves."""
        entries = {split: entry_of(content, split) for split in SPLITS}
        if not any(isinstance(entry, dict) for entry in entries.values()):
            return None
        root, parts = root_of(path, content), {}
        for split, entry in entries.items():
            if not entry:
                continue
            if not isinstance(entry, dict) or set(entry) != {"annotations", "images"}:
                raise UserError(
                    f"{path}: `{split}` must name a JSON file and a folder; "
                    f"write `{split}: {{annotations: {split}.json, images: images/{split}}}`."
                )
            annotations, images = (_spelled(root, str(entry[key])) for key in ("annotations", "images"))
            parts[split] = CocoPart(annotations=annotations, images=images)
        return cls(path=path, root=root, parts=parts, names=names_of(path, content))

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that have an annotation file."""
        return tuple(self.parts)

    def identity(self) -> tuple[str, ...]:
        """Return the folder of each split, since a yaml may change it, and the names that it gives besides."""
        parts = (f"{split}:{part.annotations.name}:{part.images.name}" for split, part in self.parts.items())
        return (*parts, *(f"name:{name}" for name in self.names or ()))

    def list_files(self, split: str) -> Listing:
        """Stamp all annotation files (their categories belong together) and the split's images."""
        missing = self.missing(split)
        if missing:
            raise UserError(missing)
        stamps = walk(str(self.parts[split].images), IMAGE_SUFFIXES)
        for part in self.parts.values():
            stamps[str(part.annotations)] = stamp(str(part.annotations)) or (0, 0)
        return Listing(stamps=stamps)

    def scan(self, split: str, listing: Listing) -> Scan:
        """Read the annotation file, then the headers of its images."""
        part, root = self.parts[split], str(self.root)
        categories = self._categories(part)
        coco = self._read(part.annotations)
        collector = FindingCollector()
        name = shown(str(coco.path), root)
        paths, listed, absent, outside = find_images(coco, str(part.images), listing, name)
        images, headers_report = scan_headers(paths, self.root)
        kept = listed[images.kept]
        names = [shown(paths[row], root) for row in images.kept]
        _compare_sizes(coco, kept, images, names, collector)
        _note_repeated(names, coco.image_ids[kept], collector)
        rows = _rows(coco, kept, np.array(list(categories), np.int64), name, collector)
        rows = clean(rows, images.sizes, len(categories), lambda _: name, collector)
        bare = np.flatnonzero(~np.isin(coco.image_ids[kept], coco.image_of))
        message = "has no annotation, so it counts as an image without objects"
        collector.add_files("unlabelled", [names[row] for row in bare], message)
        boxes_report = ScanReport(
            num_boxes=len(coco.boxes), counts=dict(collector.counts), findings=tuple(collector.findings)
        )
        index = make_index(
            tuple(categories.values()),
            self.root,
            names,
            images,
            rows,
            image_ids=coco.image_ids[kept],
            category_ids=np.array(list(categories), np.int64),
        )
        unlisted = [shown(path, root) for path in self._unlisted(split, listing, [*paths, *outside])]
        unlisted_report = remarks([], unlisted, "the JSON files")
        report = ScanReport.join([absence(absent), headers_report, boxes_report, unlisted_report])
        return Scan(index=index, report=report, outside=outside)

    def missing(self, split: str) -> str:
        """Name the annotation file or the folder of images that is not there."""
        part = self.parts[split]
        path = next((path for path in (part.annotations, part.images) if not path.exists()), None)
        return str(no_such_path(str(path), f"which {self.path} names")) if path else ""

    def where_labels_are(self, split: str) -> str:
        """Name the annotation file."""
        return f"{self.parts[split].annotations} (the list `annotations`)"

    def _unlisted(self, split: str, listing: Listing, found: Iterable[str]) -> list[str]:
        """Return the images in the folder of a split that no annotation file lists; `found` is what its own does.

        Where splits share a folder, the first of them reports what is in it.
        """
        before = itertools.takewhile(lambda name: name != split, self.parts)
        folders = tuple(os.path.join(self.parts[name].images, "") for name in before)
        walked = dict.fromkeys(path for path in listing.stamps if not path.startswith(folders))
        for path in itertools.chain(found, (str(part.annotations) for part in self.parts.values())):
            walked.pop(path, None)
        for name, part in self.parts.items():
            if walked and name != split and self._readable(part):
                for text in self._read(part.annotations).file_names:
                    for path in places_of(text, str(part.images)):
                        walked.pop(path, None)
        return list(walked)

    def _read(self, file: Path) -> CocoFile:
        """Read a file once."""
        if file not in self._files:
            self._files[file] = CocoFile.read(file)
        return self._files[file]

    def _readable(self, part: CocoPart) -> bool:
        """Tell whether the annotation file of a split that is not asked for can be read; say so once where not."""
        if part.annotations not in self._unreadable and part.annotations.exists():
            try:
                self._read(part.annotations)
                return True
            except UserError as error:
                self._unreadable.add(part.annotations)
                log.warning("%s Its categories do not count.", error)
        return False

    def _categories(self, asked: CocoPart) -> dict[int, str]:
        """Return the categories of all splits, in the order of their ids; only the one asked for must be whole."""
        joined: dict[int, str] = {}
        for part in self.parts.values():
            if part is not asked and not self._readable(part):
                continue
            for number, name in self._read(part.annotations).categories.items():
                if joined.setdefault(number, name) != name:
                    raise UserError(
                        f"{part.annotations}: category {number} is {name!r}, but {joined[number]!r} in another split; "
                        "make the files agree."
                    )
        joined = dict(sorted(joined.items()))
        if self.names is not None and self.names != tuple(joined.values()):
            raise UserError(
                f"{self.path}: `names` differs from the categories of the JSON files ({', '.join(joined.values())}); "
                "leave `names` out."
            )
        return joined


def _choose(files: list[Path], folder: Path, *, sure: bool) -> dict[str, Path]:
    """Choose the annotation file of each split, or one for an undivided set."""
    chosen: dict[str, Path] = {}
    for split in SPLITS:
        for prefix in (f"instances_{split}", split):
            matching = [file for file in files if file.name.lower().startswith(prefix)]
            if len(matching) > 1:
                raise UserError(
                    f"{folder} has several annotation files for {split} "
                    f"({', '.join(file.name for file in matching)}); write a yaml file that names one, such as "
                    f"`{split}: {{annotations: annotations/{matching[0].name}, images: {split}}}`."
                )
            if matching:
                chosen[split] = matching[0]
                break
    if chosen:
        return chosen
    instances = [file for file in files if file.name.lower().startswith("instances")] or files
    if len(instances) == 1:
        return {"train": instances[0]}
    if instances and sure:
        raise UserError(
            f"{folder} has several annotation files ({', '.join(file.name for file in instances[:5])}); "
            "name one of them as the data, or call them instances_train.json and instances_val.json."
        )
    return {}


def _images_of(file: Path) -> Path:
    """Return the folder that most likely holds a JSON's images: the first of the usual places that exists."""
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    tag = file.stem.removeprefix("instances").strip("_")
    split = next((split for split in SPLITS if tag.startswith(split)), tag)
    names = [name for name in dict.fromkeys((tag, split, "valid" if split == "val" else "")) if name]
    places = [base / name for name in names] + [base / "images" / name for name in names]
    places += [base / "images", base / "JPEGImages", base]
    return next(place for place in places if place.is_dir())


def _compare_sizes(
    coco: CocoFile, kept: NDArray[np.int64], images: Images, names: Sequence[str], collector: FindingCollector
) -> None:
    """Note images, which `names` are given to, whose size is not what the file says."""
    claimed = coco.sizes[kept]
    for row in np.flatnonzero(claimed.all(axis=1) & (claimed != images.sizes).any(axis=1)):
        (height, width), (own_height, own_width) = claimed[row], images.sizes[row]
        message = (
            f"has {own_width} x {own_height} px, but the annotations were made for {width} x {height}; "
            "check that its boxes fit"
        )
        collector.add("size", names[int(row)], 0, message)


def _note_repeated(names: Sequence[str], ids: NDArray[np.int64], collector: FindingCollector) -> None:
    """Note images, which `names` and `ids` are given to, that are listed under several ids: each has boxes of its own.

    Where the boxes of one picture are shared out like this, it teaches in each of its copies that the others are none.
    """
    ids_of: dict[str, list[str]] = {}
    for name, number in zip(names, ids.tolist(), strict=True):
        ids_of.setdefault(name, []).append(str(number))
    for name, numbers in ids_of.items():
        if len(numbers) > 1:
            message = f"is listed under the ids {', '.join(numbers[:-1])} and {numbers[-1]}; give its boxes to one id"
            collector.add("twice", name, 0, message)


def _rows(
    coco: CocoFile, kept: NDArray[np.int64], category_ids: NDArray[np.int64], name: str, collector: FindingCollector
) -> Rows:
    """Return the annotations of the images that are kept, those that are no boxes reported and left out."""
    image_rows = _places(coco.image_of, coco.image_ids[kept])
    labels = _places(coco.category_of, category_ids)
    known = np.isin(coco.image_of, coco.image_ids)
    here = image_rows >= 0
    for number in np.flatnonzero(~known):
        image = coco.image_of[number]
        message = (
            "has no `image_id` that is a whole number; add it"
            if image == NO_ID
            else f"belongs to image {image}, which is not among `images`; add it, or take this out"
        )
        collector.add("line", name, int(number) + 1, message)
    for number in np.flatnonzero(here & ~coco.formed):
        collector.add("line", name, int(number) + 1, "has no bbox of four numbers [x, y, width, height]; draw it again")
    for number in np.flatnonzero(here & coco.formed & (labels < 0)):
        category = coco.category_of[number]
        message = (
            "has no `category_id` that is a whole number; add it"
            if category == NO_ID
            else f"has category {category}, which is not among `categories`; correct it, or add it"
        )
        collector.add("class", name, int(number) + 1, message)
    numbers = np.flatnonzero(here & coco.formed & (labels >= 0))
    numbers = numbers[np.argsort(image_rows[numbers], kind="stable")]
    return Rows(
        images=image_rows[numbers],
        lines=numbers + 1,
        labels=labels[numbers],
        boxes=coco.boxes[numbers],
        crowd=coco.crowd[numbers],
        difficult=coco.difficult[numbers],
        area=coco.area[numbers],
        polygons=coco.polygons.select(numbers),
    )


def _places(wanted: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the place of each wanted id among unique `ids`, -1 where it is not there."""
    if not len(ids):
        return np.full(len(wanted), -1, np.int64)
    order = np.argsort(ids, kind="stable")
    near = np.minimum(np.searchsorted(ids[order], wanted), len(ids) - 1)
    places: NDArray[np.int64] = np.where(ids[order][near] == wanted, order[near], -1)
    return places


def _spelled(root: Path, text: str) -> Path:
    """Return the path that a text means: in the spelling that exists, else in the last one."""
    paths = [root / spelling for spelling in spellings(text)]
    return next((path for path in paths if path.exists()), paths[-1])
