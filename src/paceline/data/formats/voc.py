"""Pascal VOC format: one XML file of boxes in pixels per image, and lists of the images of each split."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import numpy as np

from paceline.data.chunks import map_chunks
from paceline.data.findings import Finding, ScanReport
from paceline.data.formats.unpaired import unpaired_labels
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.scan import (
    BadLabels,
    Labels,
    Listing,
    dangling_links,
    remarks,
    scan_pairs,
    shared_labels,
    shown,
)
from paceline.data.skim import PlainLabels
from paceline.data.stamps import Stamps, stamp, walk
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.headers import Header
    from paceline.data.scan import Scan

_XML = frozenset({".xml"})
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_CLASS_FILES = ("classes.txt", "names.txt")
_LONGEST = 100
"""Digits of a number; Python itself refuses some thousands."""


@dataclass(frozen=True, kw_only=True)
class VocSource:
    """A folder of `JPEGImages` (or `images`), `Annotations` and, if it is divided, `ImageSets/Main`."""

    path: Path
    root: Path
    annotations: Path
    images: Path
    lists: dict[str, Path]
    """Split -> list of its images; an undivided set has none."""
    class_file: Path | None
    """List of the class names, one per line; without it they come from the annotations, sorted."""
    _known: dict[tuple[str, ...], tuple[str, ...]] = field(default_factory=dict, repr=False)
    """Annotations -> the class names in them, which took a look at all."""

    format = "Pascal VOC"

    @classmethod
    def recognise(cls, folder: Path) -> VocSource | None:
        """Return the source if the folder looks like one of this format."""
        annotations = next((folder / name for name in ("Annotations", "annotations") if (folder / name).is_dir()), None)
        images = next((folder / name for name in ("JPEGImages", "images") if (folder / name).is_dir()), None)
        if not annotations or not images or (images.name == "images" and not walk(str(annotations), _XML)):
            return None
        main = folder / "ImageSets" / "Main"
        lists = {
            split: main / f"{split}.txt" for split in ("train", "val", "test") if (main / f"{split}.txt").is_file()
        }
        if "train" not in lists and "val" not in lists and (main / "trainval.txt").is_file():
            lists = {"train": main / "trainval.txt"} | lists
        class_file = next((folder / name for name in _CLASS_FILES if (folder / name).is_file()), None)
        return cls(path=folder, root=folder, annotations=annotations, images=images, lists=lists, class_file=class_file)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that have a list; an undivided set has train alone."""
        return tuple(self.lists) or ("train",)

    def identity(self) -> tuple[str, ...]:
        """Return nothing: the list of classes and all annotations are among the stamped files."""
        return ()

    def list_files(self, split: str) -> Listing:
        """Match the split's list with the images and annotations that are there."""
        links: list[str] = []  # to nothing
        images = walk(str(self.images), IMAGE_SUFFIXES, dangling=links)
        annotations = walk(str(self.annotations), _XML)
        absent = [] if split in self.lists else dangling_links(sorted(links), str(self.root))  # a list names its own
        chosen = self._listed(self.lists[split], images, absent) if split in self.lists else list(images)
        texts = {_stem(text, str(self.annotations)): text for text in annotations}
        stamps: Stamps = {image: images[image] for image in chosen} | annotations
        if split not in self.lists:
            stamps |= dict.fromkeys(sorted(links), (0, 0))  # so that it is noticed when one is mended or removed
        for file in (self.class_file, self.lists.get(split)):
            if file:
                stamps[str(file)] = stamp(str(file)) or (0, 0)
        labels = [texts.get(_stem(image, str(self.images)), "") for image in chosen]
        notes = remarks(shared_labels(chosen, labels, str(self.root)))
        if split == self.splits[0]:
            there = images if self.lists else images | dict.fromkeys(links, (0, 0))  # those are named already
            notes = ScanReport.join([self._unused(there, texts), notes])
        return Listing(stamps=stamps, images=chosen, labels=labels, absent=tuple(absent), notes=notes)

    def _unused(self, images: Stamps, texts: Mapping[str, str]) -> ScanReport:
        """Report annotations, by their names without ending, that have no image, and images that no list has.

        They belong to no split, so they are reported beside the first one.
        """
        stems = {_stem(image, str(self.images)) for image in images}
        left = [text for stem, text in texts.items() if stem not in stems]
        folders = {folder: (self._images_beside(folder),) for folder in map(os.path.dirname, left)}
        listed = {image for file in self.lists.values() for image in self._listed(file, images, [])}
        unlisted = [shown(image, str(self.root)) for image in images if image not in listed] if self.lists else []
        places = ", ".join(shown(str(file), str(self.root)) for file in self.lists.values())
        return remarks(unpaired_labels(left, folders, str(self.root)), unlisted, places)

    def _images_beside(self, folder: str) -> str:
        """Return the folder of images that belongs to a folder of annotations."""
        return os.path.join(self.images, os.path.relpath(folder, self.annotations))

    def scan(self, split: str, listing: Listing) -> Scan:
        """Read images and annotations."""
        names = self._names([path for path in listing.stamps if path.lower().endswith(".xml")])
        return scan_pairs(listing, self.root, names, VocLabels(names=names))

    def missing(self, split: str) -> str:
        """Nothing: what a folder of this format has is seen when it is recognised."""
        return ""

    def where_labels_are(self, split: str) -> str:
        """Name the folder of annotations."""
        return f"{self.annotations} (one .xml file per image, of the same name)"

    def _listed(self, file: Path, images: Stamps, absent: list[Finding]) -> list[str]:
        """Find the images that a list names, with or without ending."""
        places = {_stem(image, str(self.images)): image for image in images}
        places |= {shown(image, str(self.images)): image for image in images}  # where a.jpg is there, it is not a.png
        chosen: dict[str, None] = {}
        for number, line in enumerate(_read_lines(file), 1):
            name = line.strip()
            words = name.split()
            if not words:
                continue
            candidates = (name, os.path.splitext(name)[0], words[0])
            image = next((places[candidate] for candidate in candidates if candidate in places), None)
            if image:
                chosen[image] = None
            else:
                message = f"the image {name} is not in {self.images.name}; put it there, or take the line out"
                place = shown(str(file), str(self.root))
                absent.append(Finding(kind="absent", file=place, line=number, message=message))
        return list(chosen)

    def _names(self, annotations: Sequence[str]) -> tuple[str, ...]:
        """Return the class names: those of the class file, else all that any annotation of any split names, sorted."""
        if self.class_file:
            names = tuple(line.strip() for line in _read_lines(self.class_file) if line.strip())
            if not names:
                raise UserError(f"{self.class_file} is empty; write one class name per line, or remove the file.")
            return names
        key = tuple(annotations)
        if key not in self._known:  # the same for all splits
            self._known[key] = tuple(sorted(set[str]().union(*map_chunks(_class_names, annotations))))
        if not self._known[key]:
            raise UserError(
                f"No annotation in {self.annotations} names an object; put the .xml files with boxes there."
            )
        return self._known[key]


@dataclass(frozen=True, kw_only=True)
class VocLabels:
    """Reads the objects of an annotation; corners are taken as they stand."""

    names: tuple[str, ...]

    def read(self, content: bytes, header: Header) -> Labels:
        """Parse an annotation."""
        try:
            root = ElementTree.fromstring(content)
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise BadLabels(f"is no valid XML ({error}); export it again") from error
        if root.tag != "annotation":
            raise BadLabels(f"starts with <{root.tag}> instead of <annotation>; export it again")
        entries = Labels()
        size = (_integer(root.findtext("size/width")), _integer(root.findtext("size/height")))
        if all(size) and size != (header.width, header.height):
            entries.problems.append(("size", 0, _other_size(header, size)))
        for number, found in enumerate(root.iterfind("object"), 1):
            name = (found.findtext("name") or "").strip()
            corners = _corners(found)
            if name not in self.names:
                message = f"the class {name!r} is not in the list of names; correct it, or add it to the list"
                entries.problems.append(("class", number, message))
            elif corners is None:
                message = "has no bndbox with xmin, ymin, xmax and ymax in numbers; draw the box again"
                entries.problems.append(("line", number, message))
            else:
                entries.labels.append(self.names.index(name))
                entries.quads += corners
                entries.lines.append(number)
                entries.difficult.append((found.findtext("difficult") or "").strip().lower() in ("1", "true"))
        return entries

    def skim(self, paths: Sequence[str]) -> PlainLabels:
        """Set all aside: XML is for its parser."""
        return PlainLabels.none(len(paths))

    def place(
        self, quads: NDArray[np.float64], sizes: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Return the corners; nothing is out of range yet."""
        return quads, np.zeros(len(quads), np.bool_)

    def range_message(self, quad: NDArray[np.float64]) -> str:
        """Never needed: `place` marks nothing."""
        raise AssertionError(quad)


def _stem(path: str, folder: str) -> str:
    """Return a file's path below `folder` without its ending."""
    return os.path.splitext(shown(path, folder))[0]


def _read_lines(file: Path) -> list[str]:
    """Read a list."""
    try:
        return file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {file}; write one name per line as UTF-8 text.") from error


def _class_names(paths: Sequence[str]) -> set[str]:
    """Return the names of all objects of some annotations; what cannot be read, the scan reports."""
    names: set[str] = set()
    for path in paths:
        try:
            root = ElementTree.parse(path).getroot()
        except (OSError, ElementTree.ParseError, ValueError, LookupError):
            continue
        names.update((found.text or "").strip() for found in root.iterfind("object/name"))
    return names - {""}


def _corners(found: ElementTree.Element) -> list[float] | None:
    """Return the four corners of an object; None where one is missing or no number."""
    box = found.find("bndbox")
    if box is None:
        return None
    try:
        return [float(box.findtext(corner) or "") for corner in _CORNERS]
    except ValueError:
        return None


def _integer(text: str | None) -> int:
    """Read a whole number; 0 where there is none, or one that is no size of anything."""
    return int(text) if text and text.strip().isdecimal() and len(text) < _LONGEST else 0


def _other_size(header: Header, size: tuple[int, int]) -> str:
    """Say that an annotation was made for another size."""
    return (
        f"was made for an image of {size[0]} x {size[1]} px, but the file has {header.width} x {header.height}; "
        "check that its boxes fit"
    )
