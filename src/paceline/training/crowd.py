"""Crowd: how many threads a step takes on a CPU while other programs want its cores, too.

Threads that share the work of an operation wait for each other at its end, some thousand times in a step. On a core
that something else occupies a thread comes late to each of these meetings, and all others with it: one busy program
beside a training of two threads on two cores makes its steps many times slower, where one thread alone would lose
little. So the times of the steps are watched, and other numbers of threads are tried when they rise:

```
watch    other programs during the first steps; a window much slower than the best with this number of threads; a
         while since the last try, where there are cores to spare
try      one step up and one down the ladder (all cores, all but one, halves), a few steps each
settle   the quickest; a try that changes nothing doubles the time until the next
```
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.batch import Batch
    from paceline.training.schedule import Rates
    from paceline.training.step import Step, StepOutcome

log = logging.getLogger("paceline")

WINDOW = 8
"""Steps whose median is looked at."""
FIRST_WINDOW = 3
"""The same at the start of a run, when nobody knows yet what a step should take."""
SLOWER = 1.5
"""How much slower than the best window so far a window is when something is wrong."""
GAIN = 0.9
"""Another number of threads is taken where its steps take less than this share."""
TRIED_STEPS = 3
"""Steps with a number of threads that is tried; the first, in which operations prepare for it, does not count."""
HOPELESS = 3.0
"""A number whose step takes so many times as long as those before is not tried further."""
LEAST_STEP_S = 0.05
"""Steps that are shorter have little work to share."""
FIRST_S, LAST_S = 30.0, 600.0
"""Seconds until a further number of threads is tried again: at first, and after many tries in vain."""


def ladder(most: int) -> list[int]:
    """Return the numbers of threads that are considered, rising: 1, halves of the most, all but one, the most."""
    counts = {most, max(most - 1, 1)}
    while most > 1:
        most = (most + 1) // 2
        counts.add(most)
    return sorted(counts)


CROWD = 0.3
"""Cores that other programs take, on average, when a run starts in a crowd."""


class OtherPrograms:
    """How many cores other programs have taken since somebody asked the last time."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._now()

    def cores(self) -> float:
        """Return the mean number since the last time."""
        wall, all_s, own_s = self._now()
        wall_before, all_before, own_before = self._before
        self._before = (wall, all_s, own_s)
        return max((all_s - all_before) - (own_s - own_before), 0.0) / max(wall - wall_before, 1e-9)

    def _now(self) -> tuple[float, float, float]:
        """Wall clock, and the seconds of processors that all programs and this one have taken."""
        times = psutil.cpu_times()
        own = self._process.cpu_times()
        return time.perf_counter(), times.user + times.system + times.nice, own.user + own.system


class CrowdAwareStep:
    """Takes steps by another one, with as many threads as serve them best at the time."""

    def __init__(
        self,
        step: Step,
        *,
        most: int,
        clock: Callable[[], float] = time.perf_counter,
        count: Callable[[], int] = torch.get_num_threads,
        set_count: Callable[[int], None] = torch.set_num_threads,
        others: Callable[[], float] | None = None,
    ) -> None:
        """Start with the number of threads that is set; more than `most`, or than are set, are never taken.

        others: says how many cores other programs have taken since it was asked last.
        """
        self._step = step
        self._clock = clock
        self._set_count = set_count
        self._count = count()
        self._ladder = sorted({*ladder(max(most, self._count)), self._count})
        self._window: deque[float] = deque(maxlen=WINDOW)
        self._best: float | None = None
        self._others = others or OtherPrograms().cores
        self._is_first = self._is_new = True
        self._interval_s = FIRST_S
        self._next_try = clock() + FIRST_S
        self._try: _Try | None = None

    @property
    def threads(self) -> int:
        """Number of threads that the next step will have."""
        return self._count if self._try is None else self._try.count

    def __call__(self, batch: Batch, rates: Rates, *, completes: bool) -> StepOutcome:
        """Take one batch."""
        start = self._clock()
        outcome = self._step(batch, rates, completes=completes)
        seconds = self._clock() - start
        height, width = batch.size_hw
        self._see(seconds, seconds / (len(batch) * height * width))
        return outcome

    def _see(self, seconds: float, per_pixel: float) -> None:
        """Take in how long a step took, and decide about the next."""
        if self._is_first:
            self._is_first = False  # operations prepare
            self._others()
            return
        if self._try is not None:
            self._try.see(per_pixel)
            if self._try.is_over:
                self._settle(self._try)
            elif self._try.is_due:
                self._set_count(self._try.advance())
            return
        self._window.append(per_pixel)
        enough = FIRST_WINDOW if self._is_new else WINDOW
        if len(self._window) < enough or seconds < LEAST_STEP_S or len(self._ladder) == 1:
            return
        median = statistics.median(self._window)
        self._best = median if self._best is None else min(self._best, median)
        could_be_more = self._count < self._ladder[-1] and self._clock() >= self._next_try
        starts_in_crowd = self._is_new and self._others() > CROWD
        self._is_new = False
        if starts_in_crowd or median > SLOWER * self._best or could_be_more:
            place = self._ladder.index(self._count)
            others = [self._ladder[other] for other in (place - 1, place + 1) if 0 <= other < len(self._ladder)]
            self._try = _Try(self._count, median, others)
            self._set_count(self._try.count)

    def _settle(self, tried: _Try) -> None:
        count, took = tried.quickest()
        self._try = None
        self._window.clear()
        if count == self._count:
            self._best = tried.before  # it is as slow as that for another reason
            self._interval_s = min(2 * self._interval_s, LAST_S)
        else:
            log.info(
                "The cores of this machine are %s: steps with %d %s take %.0f %% of their time with %d; going on so.",
                "free again" if count > self._count else "wanted by others",
                count,
                "thread" if count == 1 else "threads",
                100 * took / tried.before,
                self._count,
            )
            self._count, self._best, self._interval_s = count, None, FIRST_S
        self._set_count(self._count)
        self._next_try = self._clock() + self._interval_s


class _Try:
    """Numbers of threads that are tried one after the other."""

    def __init__(self, now: int, before: float, others: list[int]) -> None:
        self.before = before
        self._now = now
        self._waiting = others[1:]
        self.count = others[0]
        self._seen: dict[int, list[float]] = {others[0]: []}

    def see(self, per_pixel: float) -> None:
        """Take in a step."""
        self._seen[self.count].append(per_pixel)

    @property
    def is_due(self) -> bool:
        """Whether the present number has had its steps."""
        seen = self._seen[self.count]
        return len(seen) >= TRIED_STEPS or max(seen) > HOPELESS * self.before

    @property
    def is_over(self) -> bool:
        """Whether all have had theirs."""
        return self.is_due and not self._waiting

    def advance(self) -> int:
        """Go on to the next number."""
        self.count = self._waiting.pop(0)
        self._seen[self.count] = []
        return self.count

    def quickest(self) -> tuple[int, float]:
        """Return the best number and its time; one that was tried has to be better by some margin."""
        times = {count: statistics.median(seen[1:] or seen) for count, seen in self._seen.items()}
        best = min(times, key=lambda count: times[count])
        return (best, times[best]) if times[best] < GAIN * self.before else (self._now, self.before)
