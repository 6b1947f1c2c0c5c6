"""Work in chunks gives what one plain loop gives, on one thread or many."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data import chunks
from paceline.data.chunks import CHUNK, LEAST_WAITING, MOST_THREADS, map_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@given(st.integers(0, 4 * CHUNK))
def test_results_come_in_order(number: int) -> None:
    entries = list(range(number))
    parts = map_chunks(list, entries)
    assert [entry for part in parts for entry in part] == entries
    assert all(len(part) == CHUNK for part in parts[:-1])


def test_waiting_work_gets_threads_and_keeps_its_order() -> None:
    seen: set[int] = set()

    def wait(entries: list[int]) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.02)
        return entries[0]

    entries = list(range(6 * CHUNK))
    assert map_chunks(wait, entries) == entries[::CHUNK]
    assert len(seen) > 2


@pytest.mark.parametrize(("wall", "busy", "threads"), [(1, 1, 1), (1, 0.5, 1), (1, 0.2, 5), (1, 0, MOST_THREADS)])
def test_threads_follow_the_waiting(wall: float, busy: float, threads: int) -> None:
    assert LEAST_WAITING > 2
    assert chunks._num_threads(wall, busy) == threads


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (8, 8), (64, MOST_THREADS)])
def test_threads_are_doubled_while_that_pays(monkeypatch: pytest.MonkeyPatch, cores: int, threads: int) -> None:
    """On a machine of so many cores, simulated: a chunk takes 10 ms of a core, and the clock stands still otherwise."""
    now, levels = 0.0, [1]

    class Pool:
        def __init__(self, number: int) -> None:
            levels.append(number)

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def map(self, work: Callable[[list[int]], list[int]], part: Sequence[list[int]]) -> list[list[int]]:
            nonlocal now
            results, start = [work(entry) for entry in part], now - 0.01 * len(part)
            now = start + 0.01 * len(part) / min(levels[-1], cores)
            return results

    def work(entries: list[int]) -> list[int]:
        nonlocal now
        now += 0.01
        return entries

    monkeypatch.setattr(chunks, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(chunks, "time", SimpleNamespace(perf_counter=lambda: now, thread_time=lambda: now))
    entries = list(range(400 * CHUNK))
    assert [entry for part in map_chunks(work, entries) for entry in part] == entries
    assert max(levels) == min(2 * threads, MOST_THREADS)  # the last trial did not pay
    ideal = 0.01 * 400 / threads
    assert now < 1.5 * ideal + 0.1


def test_errors_come_through_from_any_thread() -> None:
    def work(entries: list[int]) -> None:
        time.sleep(0.002)
        if entries[0] == 40 * CHUNK:
            raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        map_chunks(work, list(range(60 * CHUNK)))
