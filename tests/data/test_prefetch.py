from __future__ import annotations

import threading
import time

import pytest

from paceline.data.prefetch import Prefetcher


class Squares:
    """A work of `parts` parts whose result is [number squared] per part."""

    begun: int = 0

    def __init__(self, number: int, parts: int = 3, fail_at: int = -1) -> None:
        self.number, self.parts, self.fail_at = number, parts, fail_at
        self.made = [0] * parts

    def begin(self) -> int:
        Squares.begun += 1
        return self.parts

    def make(self, part: int) -> None:
        if part == self.fail_at:
            raise RuntimeError(f"part {part} of {self.number}")
        self.made[part] = self.number**2

    def finish(self) -> list[int]:
        return self.made


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("paceline-data")]


@pytest.fixture(autouse=True)
def _no_thread_left() -> object:
    Squares.begun = 0
    yield
    assert own_threads() == []


@pytest.mark.parametrize("num_threads", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3])
def test_results_come_in_order(num_threads: int, depth: int) -> None:
    prefetcher = Prefetcher(num_threads, depth)
    found = list(prefetcher.stream(Squares(number) for number in range(20)))
    assert found == [[number**2] * 3 for number in range(20)]
    prefetcher.close()


def test_a_slow_consumer_stops_the_threads() -> None:
    prefetcher = Prefetcher(2, 3)
    results = prefetcher.stream(Squares(number) for number in range(100))
    for taken in range(1, 6):
        next(results)
        assert Squares.begun <= taken + 3
    results.close()
    prefetcher.close()
    assert Squares.begun <= 8


def test_an_exception_reaches_the_consumer_in_its_turn() -> None:
    prefetcher = Prefetcher(2, 3)
    results = prefetcher.stream(Squares(number, fail_at=1 if number == 4 else -1) for number in range(10))
    for number in range(4):
        assert next(results) == [number**2] * 3
    with pytest.raises(RuntimeError, match="part 1 of 4"):
        next(results)
    assert list(prefetcher.stream([Squares(2)])) == [[4, 4, 4]]
    prefetcher.close()


def test_closing_in_the_middle_ends_all_threads_at_once() -> None:
    started = threading.Event()

    class Slow(Squares):
        def make(self, part: int) -> None:
            started.set()
            time.sleep(0.05)

    prefetcher = Prefetcher(2, 3)
    waiter: list[BaseException] = []

    def consume() -> None:
        try:
            for _ in prefetcher.stream(Slow(number, parts=100) for number in range(10)):
                pass
        except BaseException as error:
            waiter.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    started.wait()
    start = time.perf_counter()
    prefetcher.close()
    consumer.join(2)
    assert time.perf_counter() - start < 2
    assert len(waiter) == 1
