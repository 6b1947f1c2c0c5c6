"""Space: which options are searched, and between which values."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from optuna.distributions import BaseDistribution

Value = bool | int | float | str

_KEYS = frozenset({"low", "high", "log", "step", "choices"})


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False
    """Only whole numbers."""

    def holds(self, value: Value) -> bool:
        """Whether a value can be drawn."""
        if isinstance(value, bool | str) or not self.low <= value <= self.high:
            return False
        return self.step is None or math.isclose((value - self.low) / self.step, round((value - self.low) / self.step))

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


@dataclass(frozen=True, kw_only=True)
class Choices:
    """One of several values."""

    values: tuple[Value, ...]

    def holds(self, value: Value) -> bool:
        """Whether a value can be drawn."""
        return value in self.values

    def __str__(self) -> str:
        return ", ".join(str(value) for value in self.values)


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Options of `paceline train` by name, each with the values that it may take."""

    entries: Mapping[str, Range | Choices]

    @property
    def fingerprint(self) -> str:
        """The same for equal spaces."""
        return hashlib.sha256(repr(sorted(self.entries.items())).encode()).hexdigest()[:16]

    def distributions(self) -> dict[str, BaseDistribution]:
        """Say the space in Optuna's terms."""
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for name, entry in self.entries.items():
            if isinstance(entry, Choices):
                found[name] = CategoricalDistribution(entry.values)
            elif entry.whole:
                found[name] = IntDistribution(int(entry.low), int(entry.high), entry.log, int(entry.step or 1))
            else:
                found[name] = FloatDistribution(entry.low, entry.high, entry.log, entry.step)
        return found

    def require(self, defaults: Mapping[str, Value]) -> None:
        """Raise UserError where the values that a search starts from are not among those that it may draw."""
        for name, entry in self.entries.items():
            if not entry.holds(defaults[name]):
                raise UserError(
                    f"The search starts from {name}={defaults[name]}, which is not among the values to search "
                    f"({entry}); widen the range, or start elsewhere by {name}=VALUE."
                )


def default_space_text() -> str:
    """Return the default space, as YAML with comments."""
    return resources.files("paceline.tuning").joinpath("default_space.yaml").read_text(encoding="utf-8")


def read_space(file: str, check: Callable[[str, object], Value], searchable: Mapping[str, type]) -> SearchSpace:
    """Read a space from a YAML file, or the default one where `file` is empty.

    `searchable` has the type of each option that may be searched; `check` brings a value of an option to its type
    and raises UserError where the option does not take it. Raises UserError for anything else that is wrong.
    """
    import yaml

    where = file or "the default space"
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8") if file else default_space_text())
    except OSError as error:
        raise UserError(f"Cannot read {file}: {error.strerror or error}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is not YAML; write lines such as `lr0: {{low: 0.001, high: 0.1, log: true}}`."
        ) from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"{where} names nothing to search; write lines such as `lr0: {{low: 0.001, high: 0.1}}`.")
    entries = {
        str(name): _entry(f"{where}: {name}", str(name), entry, check, searchable) for name, entry in content.items()
    }
    return SearchSpace(entries=entries)


def _entry(
    where: str, name: str, entry: object, check: Callable[[str, object], Value], searchable: Mapping[str, type]
) -> Range | Choices:
    if name not in searchable:
        import difflib

        close = difflib.get_close_matches(name, searchable, n=1)
        mend = f"did you mean {close[0]}?" if close else f"it may name {', '.join(sorted(searchable))}."
        raise UserError(f"{where} cannot be searched; {mend}")
    if not isinstance(entry, dict) or not set(entry) <= _KEYS:
        raise UserError(f"{where} needs `{{low: .., high: ..}}` (and log, step), or `{{choices: [..]}}`.")
    if "choices" in entry:
        return _choices(where, name, entry, check)
    return _range(where, name, entry, check, whole=searchable[name] is int)


def _choices(where: str, name: str, entry: Mapping[str, object], check: Callable[[str, object], Value]) -> Choices:
    listed = entry["choices"]
    if not isinstance(listed, list) or not listed or set(entry) != {"choices"}:
        raise UserError(f"{where} needs a list of at least one value, and nothing beside it: `{{choices: [..]}}`.")
    values = tuple(check(name, value) for value in listed)
    if len(set(values)) < len(values):
        raise UserError(f"{where} has a choice twice; leave one of them out.")
    return Choices(values=values)


def _range(
    where: str, name: str, entry: Mapping[str, object], check: Callable[[str, object], Value], *, whole: bool
) -> Range:
    numbers: dict[str, float] = {}
    for end in ("low", "high"):
        value = check(name, entry[end]) if end in entry else None
        if value is None or isinstance(value, bool | str):
            raise UserError(f"{where} needs two numbers, `low` and `high`.")
        numbers[end] = value
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        raise UserError(f"{where}: log is {json.dumps(log)}; write true or false.")
    if step is not None and (isinstance(step, bool) or not isinstance(step, int | float) or not 0 < step < math.inf):
        raise UserError(f"{where}: step is {json.dumps(step)}; give a number above 0.")
    if whole and step is not None and not float(step).is_integer():
        raise UserError(f"{where}: step is {step:g}, but {name} is a whole number; give a whole step.")
    if numbers["low"] >= numbers["high"]:
        raise UserError(
            f"{where} goes from {numbers['low']:g} to {numbers['high']:g}, which is empty; low must be below high."
        )
    if log and numbers["low"] <= 0:
        raise UserError(f"{where} starts at {numbers['low']:g}; a log range starts above 0.")
    if log and step is not None:
        raise UserError(f"{where} has both log and step; leave one of them out.")
    return Range(low=numbers["low"], high=numbers["high"], log=log, step=step, whole=whole)
