"""Yaml file: the description of a data set, read as the plain text that its author wrote."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

SPLITS = ("train", "val", "test")
MOST_CLASSES = 100_000
"""That an `nc` may ask for: a slip of the hand would make names until the memory is full."""

_LONGEST = 100
"""Digits of a number; Python itself refuses some thousands."""

_log = logging.getLogger("paceline")

_ABSENT = frozenset({"null", "Null", "NULL", "~", ""})
"""How yaml writes that there is nothing; read as text, these are words like any other."""


class _EachOnce(getattr(yaml, "CBaseLoader", yaml.BaseLoader)):  # type: ignore[misc]
    """Reads text alone, and refuses a key that is given twice, of which yaml would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Make the mapping of a node."""
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def read_yaml(path: Path) -> Mapping[str, object]:
    """Read a yaml mapping; every scalar stays text, so that a class may be called `no` or `1.0`.

    Raises UserError for what is no yaml, no mapping, or gives a key twice.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_EachOnce)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text; name the data set's yaml file, or its folder.") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}; check the file and its permissions.") from error
    except RecursionError as error:
        raise UserError(f"{path} nests lists or mappings too deep for a data set; correct it.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise UserError(f"{path} is not valid yaml{place} ({problem}); correct that line.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping; write lines such as `train: images/train` and `names: [cat, dog]`.")
    return content


def root_of(path: Path, content: Mapping[str, object]) -> Path:
    """Return the folder that a yaml's entries start from: its `path`, else the yaml's own folder, which is logged.

    A `path` is relative to the yaml's folder. Where nothing is there, nor any of the entries beside the yaml, it is the
    one from the working folder, or from `datasets` in it, that has one of them, as other YOLO trainers read it; this is
    logged too.
    """
    own = Path(os.path.abspath(path)).parent
    named = _given(content, "path") or ""
    if not isinstance(named, str):
        raise UserError(f"{path}: `path` must be one folder; write `path: folder`, or leave it out.")
    for root in _roots(own, named):
        if root.is_dir():
            return root
    others = () if _has_entries(own, content) else (Path.cwd(), Path.cwd() / "datasets")
    for root in (root for start in others for root in _roots(start, named)):
        if _has_entries(root, content):
            _log.info("%s: its `path: %s` is %s.", path, named, root)
            return root
    _log.info("%s: there is no folder `path: %s`; its entries start from %s instead.", path, named, own)
    return own


def _roots(start: Path, named: str) -> list[Path]:
    return [Path(os.path.normpath(start / Path(text).expanduser())) for text in spellings(named)]


def _has_entries(root: Path, content: Mapping[str, object]) -> bool:
    """Whether there is anything in a folder that a yaml names as a split."""
    named = [entry_of(content, split) for split in SPLITS]
    entries = [entry for entry in named if isinstance(entry, str)]
    entries += [entry for some in named if isinstance(some, list) for entry in some if isinstance(entry, str)]
    return any((root / text).exists() for entry in filter(None, entries) for text in spellings(entry))


def entry_of(content: Mapping[str, object], split: str) -> object:
    """Return what a yaml says of a split; empty where it says nothing (`valid` is taken for `val`)."""
    return _given(content, split) or (_given(content, "valid") if split == "val" else None) or ""


def spellings(path: str) -> tuple[str, ...]:
    r"""Return a path as it is written, and, where it holds `\`, how it would be written outside Windows."""
    return (path, path.replace("\\", "/")) if "\\" in path else (path,)


def names_of(path: Path, content: Mapping[str, object]) -> tuple[str, ...] | None:
    """Read `names` (a list, or a map from class numbers) and `nc`; None where a yaml has neither.

    Raises UserError where they contradict each other.
    """
    names, count = _given(content, "names"), _given(content, "nc")
    number = _integer(path, "nc", count) if count else None
    if number is not None and number > MOST_CLASSES:
        raise UserError(f"{path}: `nc` is {count}, and no more than {MOST_CLASSES:,} classes are possible; correct it.")
    if not names:
        return None if number is None else tuple(str(label) for label in range(number))
    if isinstance(names, dict):
        listed: dict[int, str] = {}
        for text, name in names.items():
            label = _integer(path, "names", text)
            if label in listed or not isinstance(name, str):
                raise UserError(f"{path}: `names` must give each class one name; write `{label}: cat`, once.")
            listed[label] = name
        missing = sorted(set(range(len(listed))) - set(listed))
        if missing:
            raise UserError(f"{path}: `names` has no class {missing[0]}; number the {len(listed)} classes from 0.")
        result = tuple(listed[label] for label in range(len(listed)))
    elif isinstance(names, list) and all(isinstance(name, str) for name in names):
        result = tuple(names)
    else:
        raise UserError(f"{path}: `names` must be a list or a map; write `names: [cat, dog]`.")
    if number is not None and number != len(result):
        raise UserError(f"{path}: `nc` is {number}, but `names` has {len(result)} entries; make them agree.")
    return result


def keypoints_of(path: Path, content: Mapping[str, object]) -> int:
    """Return how many numbers follow each box by `kpt_shape` (keypoints, numbers of each); 0 where a yaml has none."""
    shape = _given(content, "kpt_shape")
    if not shape:
        return 0
    if not isinstance(shape, list) or len(shape) != 2:
        raise UserError(f"{path}: `kpt_shape` must be two numbers; write `kpt_shape: [17, 3]`, or leave it out.")
    keypoints, numbers = (_integer(path, "kpt_shape", text) for text in shape)
    return keypoints * numbers


def _given(content: Mapping[str, object], key: str) -> object:
    """Return what a yaml says under a key; None where it says that there is nothing."""
    value = content.get(key)
    return None if isinstance(value, str) and value in _ABSENT else value


def _integer(path: Path, key: str, text: object) -> int:
    """Read a number that is not negative."""
    if not (isinstance(text, str) and text.strip().isdecimal() and len(text) < _LONGEST):
        raise UserError(
            f"{path}: `{key}` holds {str(text)[:_LONGEST]!r} where a whole number from 0 is needed; correct it."
        )
    return int(text)
