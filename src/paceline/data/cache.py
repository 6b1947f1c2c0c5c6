"""Cache: arrays by number that all threads share, each made once, of which a few or all are kept."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from paceline.data.slab import Slab

log = logging.getLogger("paceline")

T = TypeVar("T")


class Cache(Protocol):
    """Where made arrays are found again."""

    def look(self, number: int) -> NDArray[np.uint8] | None:
        """Array `number` where it is there for good, without a lock."""

    def get(self, number: int, make: Callable[[], NDArray[np.uint8]], *, renew: bool = False) -> NDArray[np.uint8]:
        """Array `number`; `make` makes it where it is not there, and may raise to all who wait for it.

        With `renew` the array counts as if it came now.
        """

    def forget(self) -> None:
        """Let go of what is kept for a while only."""


class RecentCache(Generic[T]):
    """At most `capacity` things by number, arrays mostly; the one that came first goes first, whoever looked at it.

    A thread that asks for one that another thread is making waits for it, whatever the capacity.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._arrays: dict[int, Future[T]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._arrays)

    def look(self, number: int) -> None:
        """Nothing is there for good."""

    def get(self, number: int, make: Callable[[], T], *, renew: bool = False) -> T:
        """Thing `number`, made where it is not there; with `renew` it goes to the end of those that wait to go."""
        with self._lock:
            found = self._arrays.get(number)
            if found is None:
                mine = self._arrays[number] = Future()
            elif renew:
                self._arrays[number] = self._arrays.pop(number)
        if found is not None:
            return found.result()
        try:
            mine.set_result(make())
        except BaseException as error:
            with self._lock:
                del self._arrays[number]
            mine.set_exception(error)
            raise
        with self._lock:
            self._evict()
        return mine.result()

    def forget(self) -> None:
        """Let go of all that is made."""
        with self._lock:
            self._arrays = {number: array for number, array in self._arrays.items() if not array.done()}

    def _evict(self) -> None:
        excess = len(self._arrays) - self.capacity
        if excess > 0:
            done = (number for number, array in self._arrays.items() if array.done())
            for number in list(islice(done, excess)):
                del self._arrays[number]


class SlabCache:
    """All arrays that a slab has room for, each made once by whichever process comes first; of the others a few.

    `stamp` says from what state of its source an array is made, so that a kept slab gives no old ones; `what` names
    the arrays in the log.
    """

    def __init__(
        self,
        slab: Slab,
        others: RecentCache[NDArray[np.uint8]],
        *,
        what: str,
        stamp: Callable[[int], int] = lambda _: 0,
    ) -> None:
        self.slab = slab
        self._others = others
        self._stamp = stamp
        self._what = what
        self._said_full = False
        self.look = slab.get

    def get(self, number: int, make: Callable[[], NDArray[np.uint8]], *, renew: bool = False) -> NDArray[np.uint8]:
        """Array `number`; without a lock where this process has seen it before."""
        found = self.slab.get(number)
        if found is not None:
            return found
        return self._others.get(number, partial(self._find_or_make, number, make), renew=renew)

    def forget(self) -> None:
        """Let go of the few that the slab has no room for."""
        self._others.forget()

    def _find_or_make(self, number: int, make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8]:
        stamp = self._stamp(number)
        with self.slab.claim(number):
            found = self.slab.load(number, stamp)
            if found is not None:
                return found
            made = make()
            kept = self.slab.store(number, made, stamp)
        if kept is not None:
            return kept
        if not self._said_full:
            self._said_full = True
            log.warning(
                "The cache of %s is full: %s. What it holds (%.1f GB) is used, the others are made again each time.",
                self._what,
                self.slab.full,
                self.slab.used_bytes / 1e9,
            )
        return made
