"""The stopwatch: seconds of repeated calls on a device, several of them taken in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

SHORTEST_S = 0.05
"""Calls that are shorter than this are timed several at a time on a GPU, so that its queue never runs dry."""
LEAST_ROUNDS, MOST_ROUNDS = 6, 1000


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on one device: by events on a GPU, by the host's clock elsewhere."""

    device: torch.device

    def seconds(self, call: Callable[[], object], *, times: int = 1) -> float:
        """Return the seconds of one call, of `times` in a row."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(times):
                call()
            return (time.perf_counter() - start) / times
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        stream = torch.cuda.current_stream(self.device)
        torch.cuda.synchronize(self.device)
        begin.record(stream)
        for _ in range(times):
            call()
        end.record(stream)
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times  # type: ignore[no-any-return]

    def in_turn(
        self,
        calls: Mapping[str, Callable[[], object]],
        *,
        budget_s: float,
        agree: Callable[[list[int]], list[int]] = list,
        least: int = LEAST_ROUNDS,
    ) -> dict[str, list[float]]:
        """Time calls one after the other, round by round, for about `budget_s`; returns the seconds of each by round.

        So what disturbs the machine disturbs all of them alike. A first round warms up and says how many there can be;
        with several ranks, `agree` gives all of them the numbers of one.
        """
        first = {name: self.seconds(call) for name, call in calls.items()}
        times = [max(1, round(SHORTEST_S / s)) if self.device.type == "cuda" else 1 for s in first.values()]
        round_s = sum(n * s for n, s in zip(times, first.values(), strict=True))
        rounds = min(max(int(budget_s / round_s), least), MOST_ROUNDS)
        rounds, *times = agree([rounds, *times])
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for (name, call), number in zip(calls.items(), times, strict=True):
                found[name].append(self.seconds(call, times=number))
        return found
