"""The number of threads follows what the steps take, on a machine that is made up."""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch

from paceline.batch import Batch
from paceline.training.crowd import (
    FIRST_S,
    LAST_S,
    LEAST_STEP_S,
    TRIED_STEPS,
    WINDOW,
    CrowdAwareStep,
    OtherPrograms,
    ladder,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.training.schedule import Rates


class Machine:
    """Cores with other programs on them; its clock only goes on while a step is taken."""

    def __init__(self, threads: int, step_s: Callable[[int], float]) -> None:
        self.threads = threads
        self.step_s = step_s
        self.now = 0.0
        self.others = 0.0
        self.taken: list[int] = []
        self.completed: list[bool] = []

    def step(self, batch: Batch, rates: Rates, *, completes: bool) -> Any:
        self.taken.append(self.threads)
        self.completed.append(completes)
        self.now += self.step_s(self.threads) * batch.size_hw[0] / 64
        return len(self.taken)

    def watched(self, most: int) -> CrowdAwareStep:
        return CrowdAwareStep(
            self.step,
            most=most,
            clock=lambda: self.now,
            count=lambda: self.threads,
            set_count=lambda count: setattr(self, "threads", count),
            others=lambda: self.others,
        )


def free(threads: int) -> float:
    return 1.0 / threads


def crowded(threads: int) -> float:
    return 1.2 if threads == 1 else 6.0


def batch(size: int = 64) -> Batch:
    nothing = torch.zeros(1)
    return Batch(
        images=torch.zeros(1, 3, size, 64), boxes=nothing, labels=nothing, valid=nothing, samples=nothing,
        original_hw=nothing,
    )  # fmt: skip


def take(step: CrowdAwareStep, steps: int, size: int = 64) -> None:
    for _ in range(steps):
        step(batch(size), cast("Rates", None), completes=True)


@pytest.mark.parametrize(
    ("most", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 7, 8]), (6, [1, 2, 3, 5, 6])]
)
def test_the_ladder_has_one_all_but_one_and_all(most: int, expected: list[int]) -> None:
    assert ladder(most) == expected


def test_on_a_free_machine_nothing_is_ever_tried() -> None:
    machine = Machine(2, free)
    take(machine.watched(2), 2000)
    assert set(machine.taken) == {2}


def test_a_run_that_starts_in_a_crowd_soon_knows_it() -> None:
    machine = Machine(2, crowded)
    machine.others = 1.0
    step = machine.watched(2)
    take(step, 10)
    assert step.threads == 1


def test_a_crowd_is_answered_by_fewer_threads_and_its_end_by_more(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="paceline")
    machine = Machine(2, free)
    step = machine.watched(2)
    take(step, 40)
    machine.step_s = crowded
    take(step, 2 * WINDOW)
    assert step.threads == 1
    spent, machine.now = machine.now, machine.now
    take(step, 200)
    assert machine.now - spent < 1.1 * 200 * crowded(1), "what is tried in vain costs little"
    machine.step_s = free
    take(step, int(LAST_S / free(1)) + 50)
    assert step.threads == 2
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "The cores of this machine are wanted by others",
        "The cores of this machine are free again",
    ]


def test_slower_steps_that_no_number_of_threads_mends_are_accepted() -> None:
    machine = Machine(2, free)
    step = machine.watched(2)
    take(step, 40)
    machine.step_s = lambda threads: 3 * free(threads)
    take(step, 500)
    assert step.threads == 2
    assert machine.taken[40:].count(1) <= TRIED_STEPS


def test_a_number_that_was_chosen_in_a_crowd_is_not_for_ever() -> None:
    machine = Machine(1, free)
    step = machine.watched(4)
    take(step, int(12 * FIRST_S))
    assert step.threads == 4


def test_what_is_tried_in_vain_is_tried_more_and_more_rarely() -> None:
    machine = Machine(1, crowded)
    step = machine.watched(2)
    take(step, 2000)
    assert 3 <= machine.taken.count(2) <= 10, "one hopeless step each"


def test_larger_images_are_no_crowd() -> None:
    machine = Machine(2, free)
    step = machine.watched(2)
    for size in (64, 128, 192, 128) * 5:
        take(step, WINDOW, size)
    assert set(machine.taken) == {2}


def test_short_steps_are_left_alone() -> None:
    machine = Machine(2, lambda threads: LEAST_STEP_S / 10)
    step = machine.watched(2)
    take(step, 40)
    machine.step_s = lambda threads: LEAST_STEP_S / 2
    take(step, 40)
    assert set(machine.taken) == {2}


def test_other_programs_are_seen() -> None:
    others = OtherPrograms()
    own_until = time.process_time() + 0.3
    while time.process_time() < own_until:
        pass
    alone = others.cores()
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        beside = others.cores()
    finally:
        program.kill()
        program.wait()
    assert beside > 0.2, "of a core, whatever else the machine does"
    assert alone >= 0.0


def test_every_step_is_taken_once_and_its_outcome_given_back() -> None:
    machine = Machine(2, crowded)
    step = machine.watched(2)
    outcomes = [step(batch(), cast("Rates", None), completes=number % 4 == 3) for number in range(50)]
    assert outcomes == list(range(1, 51))
    assert machine.completed == [number % 4 == 3 for number in range(50)]
