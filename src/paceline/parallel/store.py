"""The store of a run: what ranks leave there for each other, awaited in short looks.

A look never waits by itself, so the limits of the heartbeat can end a wait for a rank that does not come.
"""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from paceline.errors import UserError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.5
_SLACK_S = 60.0


def value_of(store: Store, key: str, *, limit_s: float, option: str) -> str:
    """Return the value of a key as soon as a rank has set it.

    Raises UserError a while after `limit_s`, when the heartbeat should have named who is late. 0 is no limit; `option`
    is what sets it.
    """
    end, pause_s = time.monotonic() + (limit_s + _SLACK_S if limit_s > 0 else math.inf), _FIRST_PAUSE_S
    while not store.check([key]):
        if time.monotonic() > end:
            raise UserError(f"Another rank did not come within {limit_s:.0f} s; see what holds it, or raise {option}.")
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
    return bytes(store.get(key)).decode()


def await_count(store: Store, key: str, number: int, *, soon: bool = False) -> None:
    """Wait until what is added up under a key has come to a number; `soon` looks more often, for longer."""
    pause_s, longest_s = (0.001, 0.1) if soon else (_FIRST_PAUSE_S, _LONGEST_PAUSE_S)
    while store.add(key, 0) < number:
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, longest_s)
