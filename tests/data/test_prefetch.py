from __future__ import annotations

import threading
import time

import pytest

from paceline.data.prefetch import Prefetcher, Work


class Squares(Work[list[int]]):
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


class Rounds(Work[list[str]]):
    """Writes down what is done for it, in rounds of so many parts."""

    def __init__(self, *rounds: int, done: list[str] | None = None, name: str = "") -> None:
        self.rounds, self.name = list(rounds), name
        self.done: list[str] = [] if done is None else done

    def begin(self) -> int:
        self.now = 0
        return self.rounds[0]

    def make(self, part: int) -> None:
        self.done.append(f"{self.name}{self.now}.{part}")

    def go_on(self) -> int:
        self.now += 1
        return self.rounds[self.now] if self.now < len(self.rounds) else 0

    def finish(self) -> list[str]:
        return self.done


@pytest.mark.parametrize("num_threads", [1, 4])
@pytest.mark.parametrize("rounds", [(3,), (2, 3), (0, 3), (0,), (2, 1, 4)])
def test_a_round_begins_when_all_of_the_one_before_is_made(rounds: tuple[int, ...], num_threads: int) -> None:
    prefetcher = Prefetcher(num_threads, 2)
    for done in prefetcher.stream(Rounds(*rounds) for _ in range(20)):
        assert sorted(done) == [f"{number}.{part}" for number, count in enumerate(rounds) for part in range(count)]
        assert [entry[0] for entry in done] == sorted(entry[0] for entry in done)
    prefetcher.close()


def test_threads_take_tasks_of_the_oldest_batch_first() -> None:
    prefetcher, done = Prefetcher(1, 3), list[str]()
    works = [Rounds(2, 2, done=done, name=name) for name in "abc"]
    list(prefetcher.stream(works))
    prefetcher.close()
    assert done == [f"{name}{number}.{part}" for name in "abc" for number in (0, 1) for part in (0, 1)]


def test_an_error_in_the_second_round_reaches_the_consumer() -> None:
    class Failing(Rounds):
        def go_on(self) -> int:
            raise RuntimeError("no second round")

    prefetcher = Prefetcher(2, 3)
    with pytest.raises(RuntimeError, match="no second round"):
        list(prefetcher.stream([Rounds(2), Failing(2), Rounds(2)]))
    prefetcher.close()
