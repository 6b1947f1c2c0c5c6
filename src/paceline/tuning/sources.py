"""Sources of jobs: the trials of a study, and the confirmation of the best of them with other seeds."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from paceline.errors import UserError
from paceline.records import append_line, read_lines
from paceline.tuning.search import Job, read_ending

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from paceline.tuning.outcome import Objective, Outcome
    from paceline.tuning.study import Study


_HOPELESS = 3
"""So many failures, and nothing else, since the search began here say that it will not get better."""


def folder_of(number: int) -> str:
    """Name of a trial's run folder."""
    return f"{number:05d}"


class Trials:
    """The trials of a study, up to a number of them."""

    def __init__(self, study: Study, *, most: int, runs: Path, objective: Objective) -> None:
        """Take trials from `study`: `most` of the whole study, 0 without a limit; `runs` holds their folders."""
        self._study = study
        self._most = most
        self._runs = runs
        self._objective = objective
        self._failures: list[str] | None = []
        """Reasons of the trials that failed here since the beginning; None once one has ended in another way."""

    def next(self, device: str) -> Job | None:
        """Take the next trial, unless there are enough."""
        if self._most and self._study.num_started() >= self._most:
            return None
        asked = self._study.ask(device)
        return Job(key=folder_of(asked.number), number=asked.number, options=asked.values)

    def report(self, job: Job, seconds: float, ap: float) -> bool:
        """Take the AP of an epoch; whether to end the trial."""
        return self._study.report(job.number, seconds, ap)

    def finish(self, job: Job, outcome: Outcome, seconds: float) -> Outcome:
        """Record the end of a trial.

        Raises UserError where those that follow would fail as well: the defaults failed by something that the user can
        mend, or the first three trials here, while the defaults are not on their way.
        """
        was_defaults = self._study.is_defaults(job.number)
        settled = self._study.finish(job.number, outcome, seconds)
        if settled.ending == "failed" and self._failures is not None:
            self._failures.append(settled.reason)
            if was_defaults and settled.is_mendable:
                self._stop("The defaults cannot be trained", settled.reason)
            if len(self._failures) >= _HOPELESS and not self._study.runs_defaults():
                reason = statistics.mode(self._failures)
                self._stop(f"The first {len(self._failures)} trials have all failed", reason)
        elif settled.ending in ("complete", "pruned", "diverged"):
            self._failures = None
        return settled

    def _stop(self, what: str, reason: str) -> None:
        self._study.queue_defaults_again()
        raise UserError(f"{what}, so the search has stopped: {reason}")

    def tend(self) -> None:
        """Show that the running trials are alive, and settle those of processes that are not."""
        self._study.seen()
        self._study.reclaim(self.recoverer(self._runs, self._objective))

    @staticmethod
    def recoverer(runs: Path, objective: Objective) -> Callable[[int], Outcome | None]:
        """Return what says how a trial had ended by its folder; None where it had not, or ran on another machine."""
        return lambda number: read_ending(runs / folder_of(number), objective)


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A configuration that is trained again with other seeds."""

    number: int
    """Its trial in the search."""
    values: Mapping[str, Any]
    is_defaults: bool


@dataclass(frozen=True, kw_only=True)
class Confirmed:
    """What the seeds say of a configuration."""

    finalist: Finalist
    values: tuple[float, ...]
    """By the objective, one per seed; seeds that failed are left out."""

    @property
    def mean(self) -> float:
        """Mean over the seeds, -1 without any."""
        return statistics.fmean(self.values) if self.values else -1.0

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds, 0 for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0


class Confirmation:
    """Finalists x seeds; what was done is kept in a file of one JSON line each, and not done again."""

    def __init__(self, finalists: Sequence[Finalist], seeds: Sequence[int], file: Path) -> None:
        self._finalists = finalists
        self._file = file
        self._done: dict[tuple[int, int], float | None] = {
            (line["trial"], line["seed"]): line["value"] for line in read_lines(file)
        }
        self._waiting = [
            Job(
                key=f"{folder_of(finalist.number)}-seed{seed}",
                number=finalist.number,
                options={**finalist.values, "seed": seed},
            )
            for seed in seeds
            for finalist in finalists
            if (finalist.number, seed) not in self._done
        ]
        self._seeds = tuple(seeds)

    @property
    def num_left(self) -> int:
        """Number of runs that have not begun."""
        return len(self._waiting)

    def next(self, device: str) -> Job | None:
        """Take the next run."""
        return self._waiting.pop(0) if self._waiting else None

    def report(self, job: Job, seconds: float, ap: float) -> bool:
        """Let every run come to its end."""
        return False

    def finish(self, job: Job, outcome: Outcome, seconds: float) -> Outcome:
        """Keep the result, also that of a run that failed; one that was interrupted is done again next time."""
        if outcome.ending == "interrupted":
            return outcome
        seed = int(job.options["seed"])
        self._done[job.number, seed] = outcome.value
        line = {"trial": job.number, "seed": seed, "value": outcome.value, "reason": outcome.reason, "seconds": seconds}
        append_line(self._file, line)
        return outcome

    def tend(self) -> None:
        """Nothing waits here for a sign of life."""

    def results(self) -> list[Confirmed]:
        """Return what is known of each finalist, best mean first."""
        found = []
        for finalist in self._finalists:
            values = (self._done.get((finalist.number, seed)) for seed in self._seeds)
            found.append(Confirmed(finalist=finalist, values=tuple(value for value in values if value is not None)))
        return sorted(found, key=lambda confirmed: -confirmed.mean)
