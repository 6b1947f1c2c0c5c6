"""Chunks: the same work on many files, on as many threads as the time spent waiting for the disk is worth."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Entry = TypeVar("Entry")
Result = TypeVar("Result")

CHUNK = 256
"""Files per task of a thread."""
MOST_THREADS = 16
LEAST_WAITING = 3.0
"""Ratio of wall to processor time from which waiting is taken for the disk's, not for other programs' doing."""


def map_chunks(work: Callable[[Sequence[Entry]], Result], entries: Sequence[Entry]) -> list[Result]:
    """Apply `work` to runs of CHUNK entries, and return the results in order.

    The first run is timed. Parsing holds Python's lock, so threads only help while others wait: files that lie in
    memory are read fastest by one thread (two are a third slower, eight half as fast), files on a far disk by many.
    """
    chunks = [entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK)]
    if not chunks:
        return []
    wall, busy = time.perf_counter(), time.thread_time()
    first = work(chunks[0])
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    threads = _num_threads(wall, busy)
    if threads == 1:
        return [first, *map(work, chunks[1:])]
    with ThreadPoolExecutor(threads) as pool:
        return [first, *pool.map(work, chunks[1:])]


def _num_threads(wall_s: float, busy_s: float) -> int:
    """Return how many threads keep one processor busy when each is busy for this share of its time."""
    ratio = wall_s / max(busy_s, 1e-9)
    return 1 if ratio < LEAST_WAITING else min(MOST_THREADS, round(ratio))
