"""The words of a command line, sorted into options: `--imgsz 640`, `--imgsz=640` and `imgsz=640` are one and the same.

Values stay as they were written; `paceline.options` reads them, as it does those of YAML files and Python calls.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, get_origin

from paceline.arguments import find
from paceline.errors import UserError
from paceline.option_values import plain
from paceline.options import option_fields, unknown_option

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.options import Options

_ASSIGNMENT = re.compile(r"(?:--)?([A-Za-z][A-Za-z0-9_-]*)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--[A-Za-z][A-Za-z0-9_-]*")
_MAY_STAND_ALONE = frozenset({"amp", "cache", "resume"})
"""Options that are no truth values, but for which `--name` alone means true."""


@dataclass(kw_only=True)
class Words:
    """What a command line says."""

    options: dict[str, object] = field(default_factory=dict)
    """Raw values by flat name: a text, a list of texts, or True for a flag without a value."""
    config: str = ""
    """File of `--config`."""
    help: bool = False
    brief: bool = False
    """Whether it was asked for by `-h`."""


def sort_words(command: type[Options], words: Sequence[str]) -> Words:
    """Sort the words after a command's name.

    Raises UserError for an unknown option, a value that is missing, and a word that belongs nowhere.
    """
    result = Words()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        assignment = _ASSIGNMENT.fullmatch(word)
        if word in {"-h", "--help"}:
            result.help, result.brief = True, word == "-h"
        elif assignment is not None:
            _set(command, result, assignment[1], assignment[2])
        elif _FLAG.fullmatch(word):
            _take_flag(command, result, word[2:], rest)
        else:
            _take_bare(command, result, word)
    return result


def _take_bare(command: type[Options], result: Words, word: str) -> None:
    """Read a word without a name: a truth value's own name, or the next of those that the command takes so."""
    if (_is_truth(command, word) or (word == "resume" and word in option_fields(command))) and not Path(word).exists():
        return _set(command, result, word, "true")
    for name in command.POSITIONAL if not word.startswith("-") else ():
        value = result.options.get(name)
        if value is None or isinstance(value, list):
            result.options[name] = word if not _is_list(command, name) else [*(value or ()), word]
            return None
    mend = "write options as name=value"
    known = option_fields(command)
    if word == "=" or "" in result.options.values() or word.replace("-", "_") in known:
        mend += ", without blanks around ="
    elif result.options.get("resume") == "true" and Path(word).exists():
        mend += f", here resume={word}"
    elif "data" in known and (word.endswith((".yaml", ".yml", ".pack")) or word == known["data"].default):
        mend += f", here data={word}"
    elif word.endswith((".safetensors", ".pt")) and "model" in known:
        mend += f", here model={word}"
    raise UserError(f"{command.COMMAND} does not know what to do with {word}; {mend}.")


def _take_flag(command: type[Options], result: Words, name: str, rest: list[str]) -> None:
    """Read `--name` and the values that follow it."""
    key = name.replace("-", "_")
    known = option_fields(command)
    if key not in known and key.startswith("no_") and _is_truth(command, key[3:]):
        return _set(command, result, key[3:], "false")
    if _is_truth(command, key):
        follows = bool(rest) and isinstance(plain(rest[0]), bool | int)
        return _set(command, result, name, rest.pop(0) if follows else "true")
    if _is_list(command, key):
        numbers = known[key].annotation == tuple[int, ...]  # which end where an image's name begins
        values: list[str] = []
        while rest and not _starts_option(rest[0]) and not (numbers and values and isinstance(plain(rest[0]), str)):
            values.append(rest.pop(0))
        if not values:
            raise UserError(f"--{name} needs a value.")
        return _set(command, result, name, values)
    if key != "config" and key not in known and find(command.COMMAND, key) is None:
        raise unknown_option(command, name)
    if key in _MAY_STAND_ALONE and key in known and (not rest or _starts_option(rest[0])):
        return _set(command, result, name, "true")
    if not rest or rest[0].startswith("--"):
        raise UserError(f"--{name} needs a value, as in --{name} VALUE or {key}=VALUE.")
    return _set(command, result, name, rest.pop(0))


def _set(command: type[Options], result: Words, name: str, value: object) -> None:
    key = name.replace("-", "_")
    if key == "config":
        result.config = str(value)
        return
    if key not in option_fields(command) and find(command.COMMAND, key) is None:
        raise unknown_option(command, name)
    before = result.options.get(key)
    if key in command.POSITIONAL and isinstance(before, list):  # those without a name count as well
        value = [*before, *(value if isinstance(value, list) else [value])]
    result.options[key] = value


def _is_truth(command: type[Options], key: str) -> bool:
    """Whether an option is true or false, ours or one of the reference that is."""
    known = option_fields(command)
    if key in known:
        return known[key].annotation is bool
    argument = find(command.COMMAND, key)
    return argument is not None and any(isinstance(value, bool) for value in argument.neutral or ())


def _is_list(command: type[Options], key: str) -> bool:
    known = option_fields(command)
    return key in known and get_origin(known[key].annotation) is tuple


def _starts_option(word: str) -> bool:
    return word in {"-h", "--help"} or _FLAG.fullmatch(word) is not None or _ASSIGNMENT.fullmatch(word) is not None
