"""The time budget: how many epochs go into it."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.training.state import TrainingState

_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "": 3600.0}


def parse_duration(text: str) -> float:
    """Read `90s`, `30m`, `2h`, `1h30m` or a number of hours; returns seconds."""
    words = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd]?)", text.strip().lower())
    matched = re.fullmatch(r"(\s*\d+(?:\.\d+)?\s*[smhd]?\s*)+", text.strip().lower())
    seconds = sum(float(number) * _UNITS_S[unit] for number, unit in words)
    if not matched or seconds <= 0 or (len(words) > 1 and any(not unit for _, unit in words)):
        raise UserError(f"time={text!r} is not a duration; write 90s, 30m, 2h, 1h30m or a number of hours.")
    return seconds


@dataclass(kw_only=True)
class Budget:
    """Seconds that the whole run may take; without a limit, the epochs stay as they are."""

    limit_s: float | None
    spent_before_s: float = 0.0
    """Seconds of earlier parts of a resumed run."""
    clock: Callable[[], float] = time.perf_counter
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self.limit_s is not None

    def seconds_since_start(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self.spent_before_s + self.clock() - self._start

    def epochs(self, state: TrainingState, *, spent_s: float, reserve_s: float = 0.0) -> int:
        """Epochs that fit: those that are done and as many more, at their mean length, as the rest of the time holds.

        reserve_s: seconds that are needed at the end, for an evaluation that the epochs' length does not include.

        The learning rate follows the answer, so that it has decayed when the time is up.
        """
        if self.limit_s is None:
            return state.epochs
        mean_s = spent_s / max(state.epoch, 1)
        return state.epoch + max(int((self.limit_s - spent_s - reserve_s) / mean_s), 0)
