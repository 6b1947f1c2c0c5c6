"""The lookout: judges from the heartbeats of the ranks which of them is in trouble. It has no clock and no store."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from paceline.parallel.fault import Fault

if TYPE_CHECKING:
    from collections.abc import Mapping

    from paceline.parallel.config import LimitsConfig

LEFT = "left"
"""Phase of a rank that has done its work."""
WATCH_ALL = 32
"""World size up to which every rank watches every other."""
NEIGHBOURS = 8
"""How many of the following ranks a rank watches in a larger world; rank 0 watches all."""
_SLACK_S = 3.0
"""Ranks that reach their limit within this time of each other are judged together."""


@dataclass(frozen=True, kw_only=True)
class Beat:
    """What a rank says about itself, once a second."""

    count: int
    """Goes up with each beat."""
    step: int
    phase: str
    phase_s: float
    """Since step and phase changed last."""
    where: str
    """Line that its main thread runs."""
    waits: bool
    """Whether that line waits for other ranks."""

    def to_json(self) -> str:
        """Write it for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Beat:
        """Read what `to_json` wrote."""
        return cls(**json.loads(text))


def watched_ranks(rank: int, world: int) -> tuple[int, ...]:
    """Say whom a rank watches, so that the traffic of a large world stays in proportion."""
    if world <= WATCH_ALL or rank == 0:
        return tuple(other for other in range(world) if other != rank)
    return tuple((rank + distance) % world for distance in range(1, NEIGHBOURS + 1))


class Lookout:
    """Remembers when each rank was last heard, by the clock of this one."""

    def __init__(self, limits: LimitsConfig, hosts: Mapping[int, str]) -> None:
        self._limits = limits
        self._hosts = hosts
        self._heard: dict[int, tuple[Beat, float]] = {}
        self._judged_at: float | None = None

    def hear(self, beats: Mapping[int, Beat], now: float) -> None:
        """Take the newest beats. Where this rank itself slept, nobody else's silence counts."""
        if self._judged_at is not None and now - self._judged_at > self._limits.limit_silence / 3:
            self._heard = {rank: (beat, now) for rank, (beat, _) in self._heard.items()}
        self._judged_at = now
        for rank, beat in beats.items():
            known = self._heard.get(rank)
            if known is None or known[0].count != beat.count:
                self._heard[rank] = (beat, now)

    def last(self, rank: int) -> Beat | None:
        """Give the last beat that was heard of a rank."""
        known = self._heard.get(rank)
        return known[0] if known else None

    def fault(self, rank: int, what: str) -> Fault:
        """Word a fault of a rank where it was last heard."""
        beat = self.last(rank)
        step, phase = (beat.step, beat.phase) if beat else (0, "start")
        return Fault(rank=rank, host=self._hosts.get(rank, "an unknown host"), step=step, phase=phase, what=what)

    def silent(self, now: float, *, after_s: float) -> Fault | None:
        """Name the rank that has been silent longest, if longer than `after_s`."""
        silences = {rank: now - at for rank, (beat, at) in self._heard.items() if beat.phase != LEFT}
        rank = max(silences, key=lambda key: (silences[key], -key), default=None)
        if rank is None or silences[rank] <= after_s:
            return None
        return self.fault(rank, f"has given no sign of life for {silences[rank]:.0f} s")

    def overdue(self, now: float) -> Fault | None:
        """Name the rank whose phase is over its limit; where others are stuck with it, one that waits for nobody."""
        rows = []
        for rank, (beat, at) in self._heard.items():
            limit_s = self._limits.of(beat.phase)
            over_s = beat.phase_s + now - at - limit_s if limit_s > 0 and beat.phase != LEFT else -1e9
            rows.append((over_s, rank, beat, limit_s))
        if not rows or max(rows, key=lambda row: row[0])[0] <= 0:
            return None
        late = [row for row in rows if row[0] > -_SLACK_S]
        _, rank, beat, limit_s = min(late, key=lambda row: (row[2].waits, row[2].step, row[1]))
        option = self._limits.option(beat.phase)
        place = f" at {beat.where}" if beat.where else ""
        return self.fault(rank, f"did not get on for {limit_s:g} s{place}, the limit that {option} sets")
