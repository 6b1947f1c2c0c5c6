"""YOLO format: a `data.yaml`, folders or lists of images, and one text file of normalised boxes per image."""

from __future__ import annotations

import itertools
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.findings import Finding
from paceline.data.formats.unpaired import unpaired_labels
from paceline.data.formats.yaml_file import SPLITS, entry_of, keypoints_of, names_of, read_yaml, root_of, spellings
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.near_names import nearest_folder, no_such_path
from paceline.data.rows import TOLERANCE
from paceline.data.scan import BadLabels, Labels, Listing, dangling_links, remarks, scan_pairs, shared_labels
from paceline.data.skim import skim_labels
from paceline.data.stamps import Stamps, stamp, walk
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.data.headers import Header
    from paceline.data.scan import Scan
    from paceline.data.skim import PlainLabels

_LABEL_SUFFIXES = frozenset({".txt"})
_MOST_CLASSES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class YoloSource:
    """A data set that a yaml file describes."""

    path: Path
    root: Path
    names: tuple[str, ...]
    entries: Mapping[str, tuple[str, ...]]
    """Split -> folders and list files, as they are written."""
    keypoints: int = 0
    """Numbers that follow each box (a set of poses); 0 where longer lines are polygons."""

    format = "YOLO"

    @classmethod
    def open(cls, path: Path, content: Mapping[str, object] | None = None) -> YoloSource:
        """Read a yaml file; raises UserError where it does not describe a data set."""
        content = read_yaml(path) if content is None else content
        names = names_of(path, content)
        if not names:
            raise UserError(f"{path} has no `names`; list the classes in it, such as `names: [cat, dog]`.")
        entries = {split: _texts(path, split, entry_of(content, split)) for split in SPLITS}
        entries = {split: texts for split, texts in entries.items() if texts}
        if not entries:
            raise UserError(f"{path} names no images; write `train: images/train` (a folder or a list of files) in it.")
        keypoints = keypoints_of(path, content)
        return cls(path=path, root=root_of(path, content), names=names, entries=entries, keypoints=keypoints)

    @property
    def splits(self) -> tuple[str, ...]:
        """Those that the yaml names."""
        return tuple(self.entries)

    def identity(self) -> tuple[str, ...]:
        """Return the class names, which decide what boxes are kept, and the numbers of keypoints if there are any."""
        return (*self.names, f"keypoints:{self.keypoints}") if self.keypoints else self.names

    def list_files(self, split: str) -> Listing:
        """Walk folders and read list files; labels are found by the images -> labels rule."""
        stamps: Stamps = {}
        labels: Stamps = {}
        images: dict[str, None] = {}
        absent: list[Finding] = []
        links: list[str] = []  # to nothing
        walked: dict[str, list[str]] = {}  # folder of labels -> folders of images
        for entry in self.entries[split]:
            place = self._locate(entry)
            if os.path.isdir(place):
                visited: list[str] = []
                found = walk(place, IMAGE_SUFFIXES, visited=visited, dangling=links)
                stamps |= found
                images |= dict.fromkeys(found)
                folders = {image.rpartition(os.sep)[0] for image in found}
                # Folders without an image may have had some of a type that is not read; labels lie elsewhere if so.
                for folder in folders | {folder for folder in visited if _label_folder(folder) != folder}:
                    walked.setdefault(_label_folder(folder), []).append(folder)
                    labels |= _stamp_labels(_label_folder(folder))
            else:
                listed = self._read_list(place, absent)
                stamps |= listed
                stamps[place] = stamp(place) or (0, 0)
                images |= dict.fromkeys(listed)
                without: dict[str, None] = {}
                for image in listed:
                    text = label_path(image)
                    mark = stamp(text)
                    if mark:
                        labels[text] = mark
                    else:
                        without[os.path.dirname(text)] = None
                capitals: Stamps = {}
                for folder in without:
                    capitals |= _stamp_capitals(folder)
                labels = capitals | labels  # where there is a.txt too, that counts
        links = sorted(set(links))
        stamps |= dict.fromkeys(links, (0, 0))  # so that it is noticed when one is mended or removed
        absent += dangling_links(links, str(self.root))
        by_stem = {label[: label.rfind(".")]: label for label in labels}  # each ends in .txt
        paired = [by_stem.get(stem, "") for stem in _label_stems(images)]
        used = {label: labels[label] for label in paired if label}
        unused = labels.keys() - used.keys() - {by_stem.get(stem, "") for stem in _label_stems(links)}
        notes = self._unpaired(unused, walked) + shared_labels(list(images), paired, str(self.root))
        return Listing(
            stamps=stamps | used, images=list(images), labels=paired, absent=tuple(absent), notes=remarks(notes)
        )

    def _unpaired(self, labels: Iterable[str], walked: Mapping[str, Sequence[str]]) -> list[Finding]:
        """Name label files in folders that were walked whole and have no image; lists of images are no labels."""
        lists = {os.path.basename(entry) for entries in self.entries.values() for entry in entries}
        places = [(label, *os.path.split(label)) for label in labels]
        left = [label for label, folder, name in places if folder in walked and name not in lists]
        return unpaired_labels(left, walked, str(self.root))

    def scan(self, split: str, listing: Listing) -> Scan:
        """Read images and label files."""
        return scan_pairs(listing, self.root, self.names, YoloLabels(keypoints=self.keypoints))

    def missing(self, split: str) -> str:
        """Name the first folder or list file of a split that is not there."""
        try:
            for entry in self.entries[split]:
                self._locate(entry)
        except UserError as error:
            return str(error)
        return ""

    def where_labels_are(self, split: str) -> str:
        """Name the folder that the rule leads to."""
        place = self._locate(self.entries[split][0])
        example = os.path.dirname(label_path(os.path.join(place, "image.jpg")))
        folder = example if os.path.isdir(place) else "the folders that the rule images -> labels leads to"
        return f"{folder} (one text file per image, of the same name, with lines `class x y width height`)"

    def _locate(self, entry: str) -> str:
        """Find a folder or list file; entries such as `../train/images` are looked for beside the yaml as well."""
        own = os.path.dirname(os.path.abspath(self.path))
        for text in spellings(os.path.expanduser(entry)):
            bare = text
            while bare.startswith("../"):
                bare = bare[3:]
            candidates = [os.path.join(self.root, text), os.path.join(own, text), os.path.join(self.root, bare)]
            for candidate in candidates:
                if os.path.exists(candidate):
                    return os.path.normpath(candidate)
        likely = max(map(os.path.normpath, candidates), key=lambda path: len(nearest_folder(path)))
        raise no_such_path(likely, f"which {self.path} names")

    def _read_list(self, place: str, absent: list[Finding]) -> Stamps:
        """Read a text file of image paths, relative to `root` or to the list's own folder."""
        if not place.lower().endswith(".txt"):
            raise UserError(
                f"{self.path} names {place}, which is neither a folder nor a .txt list of images; correct it."
            )
        try:
            with open(place, encoding="utf-8-sig") as stream:
                lines = stream.read().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"Cannot read the list of images {place}; write one path per line as UTF-8 text."
            ) from error
        found: Stamps = {}
        folders = (str(self.root), os.path.dirname(place))
        for number, text in enumerate(lines, 1):
            if not text.strip():
                continue
            for spelling, folder in itertools.product(spellings(text.strip()), folders):
                path = os.path.normpath(os.path.join(folder, spelling))
                mark = stamp(path)
                if mark:
                    found[path] = mark
                    break
            else:
                message = f"the image {text.strip()} is not there; put it in its place, or take the line out"
                absent.append(Finding(kind="absent", file=place, line=number, message=message))
        return found


@dataclass(frozen=True, kw_only=True)
class YoloLabels:
    """Reads lines `class x y width height`, or `class x1 y1 x2 y2 x3 y3 ...` (a polygon), all shares of the image.

    In a set of poses a box may be followed by its keypoints, which are passed over, and there are no polygons.
    """

    keypoints: int = 0
    """Numbers that follow a box; 0 where longer lines are polygons."""

    def read(self, content: bytes, header: Header) -> Labels:
        """Parse a label file; where not one line is a box, the file is taken for something else."""
        rows = [line.split() for line in _text(content).splitlines()]
        entries = Labels()
        for number, row in enumerate(rows, 1):
            if not row:
                continue
            try:
                values = [float(text) for text in row]
                label = int(values[0])
            except (ValueError, OverflowError):
                entries.problems.append(("line", number, _no_numbers(row)))
                continue
            if label != values[0] or abs(label) > _MOST_CLASSES:
                entries.problems.append(("class", number, f"class {row[0]} is no number of a class; correct it"))
            elif len(values) in (5, 5 + self.keypoints):
                entries.labels.append(label)
                entries.quads += values[1:5]
                entries.lines.append(number)
            elif len(values) > 6 and len(values) % 2 and not self.keypoints:
                entries.outlines[len(entries.labels)] = values[1:]
                entries.labels.append(label)
                entries.quads += _surround(values[1:])
                entries.lines.append(number)
            else:
                entries.problems.append(("line", number, _wrong_count(len(values), self.keypoints)))
        if entries.problems and not entries.labels and all(kind == "line" for kind, _, _ in entries.problems):
            raise BadLabels(f"holds no boxes (line {entries.problems[0][1]} {entries.problems[0][2]})")
        entries.difficult = [False] * len(entries.labels)
        return entries

    def skim(self, paths: Sequence[str]) -> PlainLabels:
        """Read those files whose lines are all blank or five plain numbers."""
        return skim_labels(paths)

    def place(
        self, quads: NDArray[np.float64], sizes: NDArray[np.int32]
    ) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        """Turn (x, y, width, height) as shares of the image into xyxy pixels."""
        scale = sizes[:, ::-1].astype(np.float64)
        half = quads[:, 2:] / 2
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named afterwards
            boxes = np.concatenate([(quads[:, :2] - half) * scale, (quads[:, :2] + half) * scale], axis=1)
        outside = np.any(quads > 1 + TOLERANCE, axis=1) | np.any(quads[:, :2] < -TOLERANCE, axis=1)
        outside &= np.all(np.isfinite(quads), axis=1) & np.all(quads[:, 2:] > 0, axis=1)  # those are named otherwise
        return boxes, outside

    def range_message(self, quad: NDArray[np.float64]) -> str:
        """Guess pixels where a number is far above 1."""
        numbers = " ".join(f"{value:.6g}" for value in quad)
        if quad.max() > 2:
            return f"the box {numbers} looks like pixels; divide by the image's width (x, width) and height (y, height)"
        return f"the box {numbers} has a number outside 0 to 1; draw it again"


def label_path(image: str) -> str:
    """Return the label file of an image: the last folder `images` becomes `labels`, the ending `.txt`."""
    folder, name = os.path.split(image)
    return os.path.join(_label_folder(folder), os.path.splitext(name)[0] + ".txt")


def _label_stems(images: Iterable[str]) -> Iterator[str]:
    """Yield the label file of each image without its ending, looking at each folder only once."""
    folders: dict[str, str] = {}
    for image in images:
        folder, _, name = image.rpartition(os.sep)
        if folder not in folders:
            folders[folder] = os.path.join(_label_folder(folder), "")
        dot = name.rfind(".")
        yield folders[folder] + (name[:dot] if dot > 0 else name)


def _label_folder(folder: str) -> str:
    """Return the folder of labels for a folder of images."""
    parts = folder.split(os.sep)
    for number in range(len(parts) - 1, -1, -1):
        if parts[number] == "images":
            parts[number] = "labels"
            break
    return os.sep.join(parts)


def _stamp_labels(folder: str) -> Stamps:
    """Stamp the label files of one folder, without those below it."""
    return walk(folder, _LABEL_SUFFIXES, deep=False) if os.path.isdir(folder) else {}


def _stamp_capitals(folder: str) -> Stamps:
    """Stamp those label files of one folder whose ending is not in lower case, such as a.TXT, without a look at others.

    Raises UserError where the folder cannot be read.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if name[-4:].lower() == ".txt" and name[-4:] != ".txt")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UserError(f"Cannot read the folder {folder}: {error.strerror}; check its permissions.") from error
    marks = {path: stamp(path) for path in (os.path.join(folder, name) for name in names)}
    return {path: mark for path, mark in marks.items() if mark}


def _surround(points: list[float]) -> list[float]:
    """Return the box (x, y, width, height) around a polygon x1 y1 x2 y2 ...; NaN stays NaN."""
    if any(map(math.isnan, points)):  # which `min` may pass over
        return [math.nan] * 4
    xs, ys = points[0::2], points[1::2]
    left, top, right, bottom = min(xs), min(ys), max(xs), max(ys)
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


def _text(content: bytes) -> str:
    """Decode a label file: UTF-8, with or without its mark, or UTF-16 with it."""
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            return content.decode("utf-16")
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadLabels("is not text; write one line `class x y width height` per box") from error
    if "\0" in text:
        raise BadLabels("is not text (it holds zero bytes); write one line `class x y width height` per box")
    return text


def _no_numbers(row: Iterable[str]) -> str:
    """Say that a line holds words."""
    line = " ".join(row)
    return f"reads {line[:40]!r}, which is not `class x y width height` in numbers; correct it"


def _wrong_count(count: int, keypoints: int) -> str:
    """Say that a line has too few or too many numbers."""
    other = (
        f"with its keypoints {5 + keypoints} by `kpt_shape`" if keypoints else "a polygon a class and 3 or more points"
    )
    return f"has {count} numbers; a box has 5 (class x y width height), {other}"


def _texts(path: Path, split: str, entry: object) -> tuple[str, ...]:
    """Read a split's entry: one text, or a list of texts."""
    if not entry:
        return ()
    texts = entry if isinstance(entry, list) else [entry]
    if not all(isinstance(text, str) and text for text in texts):
        raise UserError(f"{path}: `{split}` must be a folder, a list file, or a list of these; correct it.")
    return tuple(texts)
