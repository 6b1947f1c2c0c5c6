"""The clock is tested: spans exclude each other and sum to the wall time."""

from __future__ import annotations

import time

import pytest

from paceline.ledger import DEVICE_WAIT, OTHER, Ledger


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_spans_exclude_each_other_and_sum_to_the_wall_time() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)
    clock.now += 1
    with ledger.span("forward"):
        clock.now += 2
        with ledger.span("loss"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    lap = ledger.lap()
    assert lap.spans_s == {OTHER: 17, "forward": 10, "loss": 4}
    assert lap.wall_s == sum(lap.spans_s.values()) == 31


def test_a_lap_starts_afresh_and_keeps_open_spans_open() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)
    with ledger.span("evaluation"):
        clock.now += 3
        assert ledger.lap().spans_s["evaluation"] == 3
        clock.now += 5
    lap = ledger.lap()
    assert lap.spans_s["evaluation"] == lap.wall_s == 5


def test_an_exception_closes_its_span() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)

    def fail() -> None:
        with ledger.span("backward"):
            clock.now += 1
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    clock.now += 2
    lap = ledger.lap()
    assert lap.spans_s["backward"] == 1
    assert lap.spans_s[OTHER] == 2


def test_each_books_the_waiting_and_not_the_work() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)

    def slow_items() -> object:
        for item in range(3):
            clock.now += 2
            yield item

    for _ in ledger.each("data", slow_items()):
        clock.now += 7
    lap = ledger.lap()
    assert lap.spans_s["data"] == 6
    assert lap.spans_s[OTHER] == 21


def test_real_time_sums_within_one_per_cent() -> None:
    ledger = Ledger()
    start = time.perf_counter()
    for number in range(2000):
        with ledger.span("even" if number % 2 else "odd"):
            sum(range(200))
    lap = ledger.lap()
    wall = time.perf_counter() - start
    assert sum(lap.spans_s.values()) == pytest.approx(lap.wall_s, rel=1e-9)
    assert lap.wall_s == pytest.approx(wall, rel=0.01)


class FakeDevice:
    """A device clock that notes what it was asked."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, name: str) -> object:
        self.events.append(f"start {name}")
        return name

    def stop(self, mark: object) -> None:
        self.events.append(f"stop {mark}")

    def read_ms(self) -> dict[str, float]:
        return {"forward": 1.5}


def test_the_device_is_asked_only_for_marked_spans() -> None:
    device = FakeDevice()
    ledger = Ledger(device_clock=device)
    with ledger.span("data"), ledger.span("forward", on_device=True):
        pass
    lap = ledger.lap()
    assert device.events == ["start forward", "stop forward"]
    assert lap.device_ms == {"forward": 1.5}
    assert DEVICE_WAIT in lap.spans_s
