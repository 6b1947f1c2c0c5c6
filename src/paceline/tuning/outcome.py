"""Outcome: how a trial ended, and what it is worth by the search's measure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

Ending = Literal["complete", "pruned", "diverged", "failed", "interrupted"]
"""`diverged` counts as a bad result, `failed` as none; what was `interrupted` is run again."""

_OBJECTIVE = re.compile(r"ap(?:@(\d+(?:\.\d+)?)(s|m|h)?)?")
_UNIT_S = {None: 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a trial."""

    ending: Ending
    value: float | None = None
    """By the objective; None where no epoch was evaluated in time."""
    reason: str = ""
    """One sentence for all endings but `complete`."""
    is_mendable: bool = False
    """Whether it failed by something that the user can mend, and that other values would meet as well."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The measure: best AP by COCO's rules on val, of a whole run or within some seconds of training."""

    within_s: float | None = None

    @classmethod
    def parse(cls, text: str) -> Objective:
        """Read `ap`, `ap@600s`, `ap@10m`. Raises UserError for anything else."""
        found = _OBJECTIVE.fullmatch(text.strip().lower())
        if found is None or (found[1] and float(found[1]) <= 0):
            raise UserError(f"objective is {text}; write `ap`, or `ap@600s` for the best AP within 600 seconds.")
        return cls(within_s=float(found[1]) * _UNIT_S[found[2]] if found[1] else None)

    def __str__(self) -> str:
        return "ap" if self.within_s is None else f"ap@{self.within_s:g}s"

    def value(self, epochs: Iterable[Mapping[str, Any]]) -> float | None:
        """Value of a run from its epochs, as `RunFolder.epochs` reads them; None where none was evaluated in time."""
        reached = [ap for seconds, ap in evaluations(epochs) if self.within_s is None or seconds <= self.within_s]
        return max(reached, default=None)


def evaluations(epochs: Iterable[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Seconds of training until the figures were there, and AP, of every evaluated epoch in order."""
    return [
        (float(line.get("evaluated_s", line["elapsed_s"])), float(line["evaluation"]["ap"]))
        for line in epochs
        if line.get("evaluation") and line["evaluation"]["ap"] is not None  # which stands for NaN
    ]
