"""Laws of graphed steps: the numbers of the eager one, whatever changes on the way, and no trace of having recorded."""

from __future__ import annotations

import dataclasses
import logging
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch
from recorder import Recorder, Recording
from steps import Work, everything, make_step, run, schedule, works

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.graphed import GraphedStep
from paceline.training.plan import StepPlan
from paceline.training.precision import Precision
from paceline.training.trials import StepTrials, TrialSetting
from paceline.training.understudy import Cast
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.batch import Batch
    from paceline.training.step import EagerStep, StepOutcome


def assert_same(found: EagerStep, expected: EagerStep) -> None:
    """Compare all that steps change."""
    mine, theirs = everything(found), everything(expected)
    torch.testing.assert_close(mine["state"], theirs["state"], rtol=1e-12, atol=1e-14)
    for one, other in zip(mine["gradients"], theirs["gradients"], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert torch.equal(mine["random"], theirs["random"])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_warm_up_by_graphs_is_the_eager_one(optimizer: str) -> None:
    asked = works(30, optimizer)
    assert {work.completes for work in asked[-8:]} == {True, False}, "accumulation is meant to have begun"
    assert {work.batch.boxes.shape[1] for work in asked} == {4, 7}
    assert len({work.rates.lr for work in asked}) == 30
    eager, inner, recorder = make_step(optimizer), make_step(optimizer), Recorder()
    graphed = GraphedStep(inner, recorder)
    torch.testing.assert_close(run(graphed, asked), run(eager, asked), rtol=1e-12, atol=1e-14)
    assert_same(inner, eager)
    assert len(recorder.recordings) <= 2 * 4, "each of two shapes has at most four"
    norms = [
        float(value.abs().max()) for value in eager.optimizer.state[next(eager.engine.network.parameters())].values()
    ]
    assert max(norms) > 0


def test_a_detector_of_the_catalogue_by_graphs_is_the_eager_one() -> None:
    def step() -> EagerStep:
        torch.manual_seed(0)
        return make_step(network=build_model("yolo11n", 3), dtype=torch.float32)

    asked = works(30)[14:20]
    eager, inner = step(), step()
    with kernels_left_out():  # what is recorded here are operations of torch
        torch.testing.assert_close(run(GraphedStep(inner, Recorder(), warmups=1), asked), run(eager, asked))
    torch.testing.assert_close(everything(inner)["state"], everything(eager)["state"])


class _Nothing:
    """What was recorded, and does nothing."""

    def replay(self) -> None:
        pass


class _RecordsOnly(Recorder):
    """Records, and forgets what it was."""

    def record(self, work: Callable[[], None]) -> Any:
        super().record(work)
        return _Nothing()


@pytest.mark.parametrize("completes", [False, True])
@pytest.mark.parametrize("accumulated", [False, True])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_recording_leaves_everything_as_it_was(optimizer: str, accumulated: bool, completes: bool) -> None:
    step = make_step(optimizer, loss_scale=8.0)
    asked = [dataclasses.replace(work, completes=number < 3) for number, work in enumerate(works(4, optimizer))]
    run(step, asked if accumulated else asked[:3])
    last = dataclasses.replace(works(5, optimizer)[-1], completes=completes)
    if completes:
        step.set_rates(last.rates)
        step.ema.updates -= 1
    before = everything(step)
    recorder = _RecordsOnly()
    GraphedStep(step, recorder)(last.batch, last.rates, completes=completes)
    assert len(recorder.recordings) == 1
    after = everything(step)
    torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
    assert torch.equal(after["random"], before["random"])
    if not completes and accumulated:
        torch.testing.assert_close(after["gradients"], before["gradients"], rtol=0, atol=0)


def test_numbers_of_the_host_would_be_noticed() -> None:
    def with_a_number(step: EagerStep) -> EagerStep:
        ema = step.ema

        def take_in() -> None:
            torch._foreach_lerp_(ema._averages, ema._values, 1 - ema.decay(ema.updates))

        ema.take_in = take_in  # type: ignore[method-assign]
        return step

    asked = works(6)
    eager, inner = with_a_number(make_step()), with_a_number(make_step())
    run(GraphedStep(inner, Recorder()), asked)
    run(eager, asked)
    with pytest.raises(AssertionError):
        assert_same(inner, eager)


def test_what_waits_for_the_host_cannot_be_recorded_and_is_taken_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    asked = works(12)
    eager, inner = make_step(fixed_shapes=False), make_step(fixed_shapes=False)  # lists points by `nonzero`
    with caplog.at_level(logging.WARNING, logger="paceline"):
        said = run(GraphedStep(inner, Recorder()), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=0, atol=0)
    assert_same(inner, eager)
    assert len(caplog.records) == 1
    assert "nonzero" in caplog.text


class _FailsAt(Recorder):
    """Runs out of memory in one of its recordings, having done a part of the work."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def record(self, work: Callable[[], None]) -> Recording:
        if len(self.recordings) == self.number:
            work()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().record(work)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_without_memory_for_a_graph_its_batches_are_taken_eagerly(
    number: int, caplog: pytest.LogCaptureFixture
) -> None:
    asked = works(24)
    eager, inner, recorder = make_step(), make_step(), _FailsAt(number)
    with caplog.at_level(logging.WARNING, logger="paceline"):
        said = run(GraphedStep(inner, recorder), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=1e-12, atol=1e-14)
    assert_same(inner, eager)
    assert len(recorder.recordings) == number
    assert len(caplog.records) == 1
    assert "out of memory" in caplog.text


def test_more_shapes_than_graphs_are_taken_eagerly_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    asked = works(24, boxes=(3, 4, 5, 6, 7))
    eager, inner, recorder = make_step(), make_step(), Recorder()
    with caplog.at_level(logging.WARNING, logger="paceline"):
        said = run(GraphedStep(inner, recorder, most_graphs=3), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=1e-12, atol=1e-14)
    assert_same(inner, eager)
    assert len(recorder.recordings) == 3
    assert [record.getMessage() for record in caplog.records if "3 graphs are recorded already" in record.getMessage()]
    assert len(caplog.records) == 1


class Watched(Recorder):
    """Knows whether it is aside, or records."""

    place = ""

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.place = "aside"
        yield
        self.place = ""

    def record(self, work: Callable[[], None]) -> Recording:
        self.place = "recording"
        recording = super().record(work)
        self.place = ""
        return recording


def test_nothing_but_replays_runs_beside_the_stream_that_records() -> None:
    """DDP frees memory of the stream that it was made on as if all work were there."""
    capture, places = Watched(), []
    inner = make_step()
    taken = inner.run

    def watched(batch: Batch, *, completes: bool) -> StepOutcome:
        places.append(capture.place)
        return taken(batch, completes=completes)

    inner.run = watched  # type: ignore[method-assign]
    run(GraphedStep(inner, capture, most_graphs=2), works(24, boxes=(3, 4, 5)))
    assert set(places) == {"aside", "recording"}
    assert places.count("recording") == 2
    assert places.count("aside") > 2 * 3, "some are taken eagerly"


@pytest.mark.parametrize("begins", [0, 23], ids=["single batches", "an accumulation"])
def test_ranks_complete_eleven_updates_before_the_first_one_is_recorded(begins: int) -> None:
    """DDP counts the batches whose gradients travel; a resumed run begins with some that do not."""
    capture, places = Watched(), []
    inner = make_step()
    taken = inner.run

    def watched(batch: Batch, *, completes: bool) -> StepOutcome:
        places.append((capture.place, completes))
        return taken(batch, completes=completes)

    inner.run = watched  # type: ignore[method-assign]
    asked = works(32, boxes=(4,))[begins:]
    assert asked[0].completes == (begins == 0)
    run(GraphedStep(inner, capture, largest=lambda number: number), asked)
    first = places.index(("recording", True))
    assert places[:first].count(("aside", True)) == 11


def test_an_update_that_is_not_finite_is_left_out_by_the_graph_too() -> None:
    asked = works(1)[0]
    clean = dataclasses.replace(asked.batch, images=torch.rand_like(asked.batch.images.double()))
    poisoned = dataclasses.replace(clean, images=clean.images.clone())
    poisoned.images[0, 0, 0, 0] = float("nan")
    floats = [Work(batch, asked.rates, True) for batch in (clean, poisoned, clean)]
    eager, inner = make_step(loss_scale=8.0), make_step(loss_scale=8.0)
    said = run(GraphedStep(inner, Recorder()), floats)
    assert [float(values[-1]) for values in said] == [0.0, 1.0, 0.0]
    expected = run(eager, floats)
    torch.testing.assert_close(said, expected, rtol=1e-12, atol=1e-14, equal_nan=True)
    for one, other in zip(inner.engine.network.parameters(), eager.engine.network.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
        assert torch.isfinite(one).all()
    assert inner.engine.loss_scale.value == eager.engine.loss_scale.value == 4.0  # type: ignore[attr-defined]


def test_ranks_agree_on_one_room_and_a_batch_that_needs_more_is_taken_eagerly() -> None:
    asked = works(24, boxes=(4, 7, 9, 2))
    eager, inner, recorder = make_step(), make_step(), Recorder()
    questions: list[int] = []

    def largest(number: int) -> int:
        questions.append(number)
        return max(number, 8) if number > 1 else number

    said = run(GraphedStep(inner, recorder, largest=largest), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=1e-12, atol=1e-14)
    assert_same(inner, eager)
    assert 1 < len(recorder.recordings) <= 4
    assert questions == [7] + [0] * len(recorder.recordings), "the room once, and whether each recording went well"


def test_a_rank_that_records_goes_on_without_a_graph_where_another_could_not(caplog: pytest.LogCaptureFixture) -> None:
    asked = works(12)
    eager, inner = make_step(), make_step()
    with caplog.at_level(logging.WARNING, logger="paceline"):
        said = run(GraphedStep(inner, Recorder(), largest=lambda number: max(number, 1)), asked)
    torch.testing.assert_close(said, run(eager, asked), rtol=0, atol=0)
    assert_same(inner, eager)
    assert "another rank" in caplog.text


def test_a_run_that_resumes_with_gradients_waiting_goes_on_by_graphs() -> None:
    asked = works(30)
    stop = next(number for number in range(20, 30) if not asked[number - 1].completes)
    eager = make_step()
    run(eager, asked[:stop])
    resumed = make_step()
    with torch.no_grad():
        torch._foreach_copy_(resumed.state(), eager.state())
    resumed.ema.updates = eager.ema.updates
    resumed.engine.load_pending({name: value.clone() for name, value in eager.engine.pending().items()})
    said = run(GraphedStep(resumed, Recorder()), asked[stop:])
    torch.testing.assert_close(said, run(eager, asked[stop:]), rtol=1e-12, atol=1e-14)
    assert_same(resumed, eager)


class _Clock:
    """A device's clock that must not be asked while a graph is recorded."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.recording = False

    def start(self, name: str) -> object:
        assert not self.recording
        self.names.append(name)
        return name

    def stop(self, mark: object) -> None:
        assert not self.recording

    def read_ms(self) -> dict[str, float]:
        return {}


def test_a_graph_is_one_entry_of_the_ledger_and_its_recording_another() -> None:
    clock = _Clock()

    class Watched(Recorder):
        def record(self, work: Callable[[], None]) -> Recording:
            clock.recording = True
            try:
                return super().record(work)
            finally:
                clock.recording = False

    ledger = Ledger(device_clock=clock)
    step = GraphedStep(make_step(ledger=ledger), Watched())
    run(step, [dataclasses.replace(work, completes=True) for work in works(6, boxes=(4,))])
    lap = ledger.lap()
    assert set(lap.spans_s) <= {"step", "capture", "other", "device_wait"}
    assert lap.spans_s["step"] > 0
    assert lap.spans_s["capture"] > 0
    assert clock.names == ["step"] * 6


@pytest.mark.parametrize("fails", [False, True])
def test_a_trial_of_graphs_is_timed_by_its_graph_or_not_at_all(fails: bool) -> None:
    torch.manual_seed(0)
    recorder: Recorder = _FailsAt(0) if fails else Recorder()
    cast = Cast(
        network=build_model("yolo11n", 3),
        criterion=DetectionLoss(LossConfig(), 3, fixed_shapes=True),
        optimizer=schedule().plan,
        freeze=0,
        clip=10.0,
    )
    setting = TrialSetting(cast=cast, device=torch.device("cpu"), imgsz=64, boxes=2, padded_boxes=4)
    plan = StepPlan(precision=Precision(name="fp32"), graphs=True)
    with StepTrials(setting, 2, capture=lambda device: recorder) as trials:
        seconds = [trials.seconds(plan) for _ in range(2)]
    assert all(math.isinf(value) == fails for value in seconds)
    assert len(recorder.recordings) == (0 if fails else 1)
