"""Chunks: the same work on many files, on as many threads as waiting disks and idle cores are worth."""

from __future__ import annotations

import math
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
WORTH = 1.2
"""Gain of speed for which the number of threads is doubled."""
TRIAL_S = 0.02
"""Seconds that a number of threads is tried for, at least."""
MOST_TRIAL = 8
"""Chunks per thread in a trial, at most."""


def map_chunks(work: Callable[[Sequence[Entry]], Result], entries: Sequence[Entry]) -> list[Result]:
    """Apply `work` to runs of CHUNK entries, and return the results in order.

    The first run is timed: while one thread waits for a far disk, others can work. Then the number of threads is
    doubled for as long as that raises the measured rate by WORTH. It does where the native library reads files, which
    needs no lock of Python's, and there are cores to spare; parsers in Python hold the lock, and stay on one thread.
    """
    chunks = [entries[start : start + CHUNK] for start in range(0, len(entries), CHUNK)]
    if not chunks:
        return []
    wall, busy = time.perf_counter(), time.thread_time()
    results = [work(chunks[0])]
    wall, busy = time.perf_counter() - wall, time.thread_time() - busy
    trial = min(max(math.ceil(TRIAL_S / max(wall, 1e-9)), 1), MOST_TRIAL)  # chunks per thread

    def run(number: int, threads: int) -> float:
        """Work through the next chunks on some threads; return chunks per second."""
        start = time.perf_counter()
        part = chunks[len(results) : len(results) + number]
        if threads == 1:
            results.extend(map(work, part))
        else:
            with ThreadPoolExecutor(threads) as pool:
                results.extend(pool.map(work, part))
        return len(part) / max(time.perf_counter() - start, 1e-9)

    threads = _num_threads(wall, busy)
    rate = 0.0
    while len(chunks) - len(results) >= 2 * trial * 2 * threads and threads < MOST_THREADS:
        rate = rate or run(trial * threads, threads)
        doubled = run(trial * 2 * threads, 2 * threads)
        if doubled < WORTH * rate:
            break
        threads, rate = 2 * threads, doubled
    run(len(chunks) - len(results), threads)
    return results


def _num_threads(wall_s: float, busy_s: float) -> int:
    """Return how many threads keep one processor busy when each is busy for this share of its time."""
    ratio = wall_s / max(busy_s, 1e-9)
    return 1 if ratio < LEAST_WAITING else min(MOST_THREADS, round(ratio))
