"""Work in chunks gives what one plain loop gives, on one thread or many."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.data import chunks
from paceline.data.chunks import CHUNK, LEAST_WAITING, MOST_THREADS, map_chunks


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
