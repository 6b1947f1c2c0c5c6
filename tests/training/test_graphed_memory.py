"""Graphed steps whose memory gives out: the recording is given up, and eager steps go on in micro-batches."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest
import torch
from batches import make_batch
from recorder import Recorder, Recording
from steps import Work, everything, make_step, run, schedule, works

from paceline.parallel.micro import MicroBatches
from paceline.parallel.single import SingleEngine
from paceline.training.graphed import GraphedStep

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from paceline.training.step import EagerStep

OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")


def patient(*, room: int | None = None) -> EagerStep:
    """An eager step that may be cut; `room` is how many pictures of 64 px it takes at once from the start."""
    step = make_step()
    assert isinstance(step.engine, SingleEngine)
    step.engine = MicroBatches(step.engine)
    step.engine._most_px = None if room is None else room * 64 * 64
    return step


class Memory:
    """Room for so many images in the forward pass from the call `first` on."""

    def __init__(self, step: EagerStep, room: int, *, first: int = 1) -> None:
        self.failures, self.calls, self.room, self.first = 0, 0, room, first
        step.engine.network.register_forward_pre_hook(self._take)

    def _take(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.calls += 1
        if self.calls >= self.first and len(inputs[0]) > self.room:
            self.failures += 1
            raise OUT_OF_MEMORY


class _FailsAtRecording(Recorder):
    """Has room for the runs before, and none for the recording."""

    def record(self, work: Callable[[], None]) -> Recording:
        work()
        raise OUT_OF_MEMORY


def assert_same(found: EagerStep, expected: EagerStep) -> None:
    mine, theirs = everything(found), everything(expected)
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=1e-10, atol=1e-13)
    assert torch.equal(mine["random"], theirs["random"])


@pytest.mark.parametrize("where", ["before recording", "while recording"])
def test_without_room_for_a_graph_the_run_goes_on_in_micro_batches(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = works(24)
    expected = patient(room=2)
    step = patient()
    memory = Memory(step, room=2 if where == "before recording" else 3)
    graphed = GraphedStep(step, _FailsAtRecording() if where == "while recording" else Recorder())
    with caplog.at_level(logging.WARNING, "paceline"):
        found = run(graphed, asked[:1])
        memory.room = 2
        if where == "while recording":  # the first step fitted whole
            expected = patient()
            sums = run(expected, asked[:1])
            expected.engine._most_px = 2 * 64 * 64  # type: ignore[attr-defined]
        else:
            sums = run(expected, asked[:1])
        found += run(graphed, asked[1:])
    sums += run(expected, asked[1:])
    assert memory.failures == (2 if where == "before recording" else 1)  # of a recording, then of an eager step
    torch.testing.assert_close(found, sums, rtol=1e-10, atol=1e-13)
    assert_same(step, expected)
    messages = "\n".join(caplog.messages)
    assert messages.count("are taken without one: CUDA out of memory") == 1
    assert messages.count("go in micro-batches of 2") == 1


def test_an_eager_step_that_is_cut_keeps_what_graphs_have_accumulated() -> None:
    """Of each update, batches of one shape come by graph, and one of another shape is eager and fails."""
    plan = schedule()
    rates = plan.rates(0.5, 10)

    def one_update(seed: int) -> list[Work]:
        small = [make_batch(3, seed=seed + k) for k in range(3)]
        large = make_batch(4, seed=seed + 9, size=96)
        order = [small[0], large, small[1], small[2]]
        return [Work(batch, rates, batch is small[2]) for batch in order]

    expected, step = patient(), patient()
    inner = expected.engine
    assert isinstance(inner, MicroBatches)
    memory = Memory(step, room=3)
    recorder = Recorder()
    graphed = GraphedStep(step, recorder, most_graphs=3)
    warm = [Work(make_batch(3, seed=90 + k), rates, k == 2) for k in range(3)]  # three graphs: first, between, last
    found, sums = run(graphed, warm), run(expected, warm)
    assert len(recorder.recordings) == 3
    for seed in (0, 20):
        asked = one_update(seed)
        found += run(graphed, asked)
        sums += run(expected, asked[:1])
        inner._most_px = 2 * 96 * 96
        sums += run(expected, asked[1:2])
        inner._most_px = None
        sums += run(expected, asked[2:])
    assert memory.failures == 1
    torch.testing.assert_close(found, sums, rtol=1e-10, atol=1e-13)
    assert_same(step, expected)
