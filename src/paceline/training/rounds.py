"""Rounds: candidates timed in turn, the hopeless ones left out early, within a budget of time.

```
warm-up   A B C D      once each, not counted; what took far longer than the best is out
round 1   A B C        what is far behind the best is out
round 2   A   C        what is a little behind is out
round 3   A   C        ...
```
Taking turns lets a disturbance of the machine hit all alike, and what counts is the least time of each, since other
work can only make a step slower.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

C = TypeVar("C")
C_contra = TypeVar("C_contra", contravariant=True)

TIE = 0.02
"""A candidate has to be faster by more than this share to be preferred to one that stands before it."""
_WARM_UP_SLACK = 3.0
"""A warm-up holds allocations and the choice of kernels, so it may be this many times as long as the best one."""
_SLACKS = (1.25, 1.10, 1.05)
"""How many times the best a candidate's time may be after each round, to be in the next one; the last for ever."""


class Runs(Protocol[C_contra]):
    """What carries a candidate out."""

    def seconds(self, candidate: C_contra) -> float:
        """Carry it out once; infinite where it is not possible."""

    def leave(self, candidate: C_contra) -> None:
        """Free what it holds: it will not come again."""


@dataclass(frozen=True, kw_only=True)
class Timed(Generic[C]):
    """A candidate and its least seconds; infinite where it could not be carried out."""

    candidate: C
    seconds: float
    rounds: int
    """How often it was timed; 0 where a warm-up was enough to leave it out."""


def time_in_rounds(
    candidates: Sequence[C],
    runs: Runs[C],
    *,
    budget_s: float,
    most_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Timed[C]]:
    """Time candidates and return all of them, the best first; of equals, the one that came first in `candidates`.

    budget_s: no round begins after this time, nor the warm-up of a further candidate once one could be carried out.
        What was not reached is not returned.
    """
    start = clock()
    least = {}  # type: dict[C, float]
    rounds = dict.fromkeys(candidates, 0)
    for candidate in candidates:
        if clock() - start > budget_s and any(math.isfinite(value) for value in least.values()):
            break
        least[candidate] = runs.seconds(candidate)
    alive = _hopeful(least, list(least), _WARM_UP_SLACK, runs)
    for number in range(most_rounds):
        if not alive or clock() - start > budget_s or (len(alive) == 1 and number > 0):
            break
        for candidate in alive:
            seconds = runs.seconds(candidate)
            least[candidate] = min(least[candidate], seconds) if rounds[candidate] else seconds
            rounds[candidate] += 1
        alive = _hopeful(least, alive, _SLACKS[min(number, len(_SLACKS) - 1)], runs)
    for candidate in alive:
        runs.leave(candidate)
    timed = [Timed(candidate=c, seconds=least[c], rounds=rounds[c]) for c in least]
    best = best_of(timed)
    return sorted(timed, key=lambda entry: (entry is not best, entry.seconds))


def best_of(timed: Sequence[Timed[C]]) -> Timed[C]:
    """Return the fastest of those that were timed most often; a later one has to be faster by more than a tie."""
    possible = [entry for entry in timed if math.isfinite(entry.seconds)] or list(timed)
    most = max(entry.rounds for entry in possible)
    finalists = [entry for entry in possible if entry.rounds == most]
    least = min(entry.seconds for entry in finalists)
    return next(entry for entry in finalists if entry.seconds <= least * (1 + TIE))


def _hopeful(least: dict[C, float], alive: list[C], slack: float, runs: Runs[C]) -> list[C]:
    best = min((least[candidate] for candidate in alive), default=math.inf)
    kept = [c for c in alive if math.isfinite(least[c]) and least[c] <= best * slack]
    for candidate in alive:
        if candidate not in kept:
            runs.leave(candidate)
    return kept
