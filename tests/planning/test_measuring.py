"""The stopwatch, memory, limits and noise."""

from __future__ import annotations

import mmap
import time
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.planning import limits
from paceline.planning.limits import best_of, measure_limits, rates_of
from paceline.planning.machine import machine_of, processor_name
from paceline.planning.memory import PeakMemory
from paceline.planning.noise import BOXES, PADDED, noise_batch
from paceline.planning.record import LimitsRecord
from paceline.planning.stopwatch import MOST_ROUNDS, Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CPU = torch.device("cpu")


class _Clock:
    """A clock that only moves when a call says how long it takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def call(self, name: str, seconds: float, log: list[str]) -> Callable[[], None]:
        def taken() -> None:
            log.append(name)
            self.now += seconds

        return taken


def test_calls_are_taken_in_turn_for_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, log = _Clock(monkeypatch), list[str]()
    calls = {"a": clock.call("a", 0.25, log), "b": clock.call("b", 0.75, log)}
    found = Stopwatch(CPU).in_turn(calls, budget_s=20.0)
    assert found == {"a": [0.25] * 20, "b": [0.75] * 20}
    assert log == ["a", "b"] * 21  # the first round is not counted


@pytest.mark.parametrize(("budget_s", "rounds"), [(0.0, 6), (1e9, MOST_ROUNDS)])
def test_rounds_have_bounds(monkeypatch: pytest.MonkeyPatch, budget_s: float, rounds: int) -> None:
    clock = _Clock(monkeypatch)
    found = Stopwatch(CPU).in_turn({"a": clock.call("a", 0.5, [])}, budget_s=budget_s)
    assert len(found["a"]) == rounds


def test_ranks_take_the_rounds_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock(monkeypatch)
    found = Stopwatch(CPU).in_turn({"a": clock.call("a", 0.5, [])}, budget_s=5.0, agree=lambda numbers: [7, 2])
    assert found["a"] == [0.5] * 7
    assert clock.now == pytest.approx(0.5 * (1 + 7 * 2))


def test_the_peak_is_that_since_it_was_forgotten() -> None:
    before = PeakMemory(CPU)
    block = mmap.mmap(-1, 128 << 20)  # fresh from the kernel: torch could take what earlier tests have left
    block.write(b"1" * len(block))
    after = PeakMemory(CPU)
    grown = before.record()
    assert grown.kind == "resident"
    assert grown.peak_bytes >= 60 << 20
    assert grown.reserved_bytes > grown.peak_bytes
    block.close()
    after.forget()
    assert after.record().peak_bytes < 32 << 20


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = limits._Sizes(squares=(64, 128), convolutions=((1, 16, 16),), copy_bytes=1 << 20)
    monkeypatch.setattr(limits, "_SIZES", {"cpu": sizes})


@pytest.mark.usefixtures("small")
def test_limits_of_each_type_are_measured() -> None:
    found = measure_limits(CPU, ("fp32", "bf16"))
    assert found.operations_per_s.keys() == found.best.keys() == {"fp32", "bf16"}
    assert min(found.operations_per_s.values()) > 1e6
    assert 1e6 < found.bytes_per_s < 1e13
    rates = rates_of(found, "bf16")
    assert (rates.operations_per_s, rates.bytes_per_s) == (found.operations_per_s["bf16"], found.bytes_per_s)


def test_the_best_of_two_measurements_counts() -> None:
    one = LimitsRecord(operations_per_s={"fp32": 3.0, "bf16": 4.0}, best={"fp32": "a", "bf16": "b"}, bytes_per_s=5.0)
    other = LimitsRecord(operations_per_s={"fp32": 2.0, "bf16": 9.0}, best={"fp32": "c", "bf16": "d"}, bytes_per_s=6.0)
    expected = LimitsRecord(
        operations_per_s={"fp32": 3.0, "bf16": 9.0}, best={"fp32": "a", "bf16": "d"}, bytes_per_s=6.0
    )
    assert best_of(one, other) == best_of(other, one) == expected


def test_a_batch_of_noise_is_a_batch_and_always_the_same() -> None:
    batch = noise_batch(3, 64, 5, dtype=None, device=CPU)
    again = noise_batch(3, 64, 5, dtype=None, device=CPU)
    assert all(torch.equal(getattr(batch, name), getattr(again, name)) for name in ("images", "boxes", "labels"))
    assert batch.images.dtype == torch.uint8
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.valid.sum(dim=1).tolist() == [BOXES] * 3
    assert batch.boxes.shape == (3, PADDED, 4)
    inside = batch.boxes[batch.valid]
    assert bool((inside[:, 2:] > inside[:, :2]).all())
    assert float(inside.min()) >= 0
    assert float(inside.max()) <= 64
    assert not batch.boxes[~batch.valid].any()
    assert int(batch.labels.min()) >= 0
    assert int(batch.labels.max()) < 5
    drawn = noise_batch(3, 64, 5, dtype=torch.bfloat16, device=CPU)
    assert drawn.images.dtype == torch.bfloat16
    assert float(drawn.images.max()) <= 1


def test_the_machine_is_named(tmp_path: Path) -> None:
    machine = machine_of(CPU)
    assert machine.device == machine.processor
    assert machine.cores >= 1
    assert machine.versions["torch"] == torch.__version__
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: A chip: fast\n")
    assert processor_name(tmp_path / "cpuinfo") == "A chip: fast"
    assert processor_name(tmp_path / "nothing")
