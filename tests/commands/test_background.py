"""What a run does off the critical path: checkpoints on a thread, evaluations beside the training, and their ends."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from paceline.callbacks import Callback
from paceline.commands import evaluation as evaluation_module
from paceline.commands.evaluation import evaluate_network
from paceline.commands.train import train
from paceline.errors import UserError
from paceline.options import TrainOptions
from paceline.training import keeper as keeper_module
from paceline.training.checkpoint import load_resume_point

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.commands.train import TrainResult
    from paceline.records import EpochRecord, EvaluationRecord, StepRecord


@pytest.fixture(autouse=True, scope="module")
def _threads_stay() -> Iterator[None]:
    """Whole runs are compared to the last bit, which depends on the number of threads: it is not for a crowd to say."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("paceline")]
    assert left == []


def options(data_yaml: Path, project: Path, **more: object) -> TrainOptions:
    flat: dict[str, object] = {
        "data": str(data_yaml), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 4, "nbs": 4, "workers": 2,
        "amp": "off", "device": "cpu", "plots": False, "project": str(project), "lr0": 0.002, "optimizer": "SGD",
    }  # fmt: skip
    return TrainOptions.from_flat(flat | more)


class Events(Callback):
    """Notes what happens in order; `at` is called with each note."""

    def __init__(self, at: Any = None) -> None:
        self.seen: list[str] = []
        self.epochs: list[EpochRecord] = []
        self._at = at

    def note(self, word: str) -> None:
        self.seen.append(word)
        if self._at is not None:
            self._at(word)

    def on_step(self, record: StepRecord) -> None:
        self.note(f"step {record.epoch}.{record.step}")

    def on_evaluation(self, epoch: int, record: EvaluationRecord) -> None:
        self.note(f"evaluation {epoch}")

    def on_epoch(self, record: EpochRecord) -> None:
        self.epochs.append(record)
        self.note(f"epoch {record.epoch}")


class Evaluator:
    """Stands in for `evaluate_network`: notes the weights that it was given, and waits for a gate."""

    def __init__(self, *, gated: bool = False, aps: tuple[float, ...] = ()) -> None:
        self.gate = threading.Event()
        self.begun = threading.Event()
        if not gated:
            self.gate.set()
        self.weights: list[dict[str, torch.Tensor]] = []
        self.threads: list[str] = []
        self._aps = list(aps)

    def __call__(self, network: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        self.weights.append({key: value.clone() for key, value in network.state_dict().items()})
        self.threads.append(threading.current_thread().name)
        self.begun.set()
        assert self.gate.wait(60)
        evaluation = evaluate_network(network, *arguments, **keywords)
        if evaluation is None or not self._aps:
            return evaluation
        return dataclasses.replace(evaluation, record=dataclasses.replace(evaluation.record, ap=self._aps.pop(0)))


def standing_in(evaluator: Any, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(evaluation_module, "evaluate_network", evaluator)
    return evaluator


def weights(result: TrainResult, stem: str) -> dict[str, torch.Tensor]:
    return load_file(result.folder.weights / f"{stem}.safetensors")


def header(result: TrainResult, stem: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((result.folder.weights / f"{stem}.json").read_text())
    return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("interval", [1, 2])
def test_beside_the_training_or_within_it_gives_the_same_run(squares: Path, tmp_path: Path, interval: int) -> None:
    more = {"epochs": 5, "val_interval": interval}
    within = train(options(squares, tmp_path, name="within", **more))
    beside = train(options(squares, tmp_path, name="beside", val_async=True, **more))
    assert same(weights(within, "last"), weights(beside, "last"))
    assert same(weights(within, "best"), weights(beside, "best"))
    assert header(within, "best") == header(beside, "best")
    assert aps(within) == aps(beside)
    assert within.end.best_epoch == beside.end.best_epoch
    assert within.evaluation == beside.evaluation


def test_training_goes_on_while_an_evaluation_is_blocked(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = standing_in(Evaluator(gated=True), monkeypatch)
    reached = [f"step {epoch}.{step}" for epoch in (2, 3) for step in (1, 2, 3)]

    def open_after_two_more_epochs(word: str) -> None:
        if word == reached[-1]:
            assert evaluator.begun.wait(60)
            assert not evaluator.gate.is_set()
            evaluator.gate.set()

    events = Events(open_after_two_more_epochs)
    result = train(options(squares, tmp_path, val_async=True, val_interval=2, epochs=5), [events])
    assert result.end.reason == "finished"
    third = events.seen.index("step 3.3")
    assert "evaluation 2" in events.seen[third:], "the figures of epoch 2 came after all steps of epoch 3"
    assert [word for word in events.seen[:third] if word.startswith("evaluation")] == []
    assert evaluator.threads[0] == "paceline-evaluation"
    assert sum(word.startswith("step") for word in events.seen) == 15


def test_a_second_evaluation_waits_for_the_first_and_says_so(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = standing_in(Evaluator(gated=True), monkeypatch)
    timer = threading.Timer(0.5, evaluator.gate.set)

    def start_timer(word: str) -> None:
        if word == "step 2.3":
            timer.start()

    events = Events(start_timer)
    result = train(options(squares, tmp_path, val_async=True, epochs=3), [events])
    timer.join()
    order = [word for word in events.seen if not word.startswith("step")]
    assert order == ["epoch 1", "evaluation 1", "epoch 2", "evaluation 2", "evaluation 3", "epoch 3"]
    assert events.epochs[1].spans_s["evaluation_wait"] > 0.3
    for line in result.folder.records("epoch"):
        assert sum(line["spans_s"].values()) == pytest.approx(line["wall_s"], rel=0.01)


def test_the_best_is_what_was_evaluated_and_not_what_came_later(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = standing_in(Evaluator(aps=(0.1, 0.9, 0.2, 0.3)), monkeypatch)
    result = train(options(squares, tmp_path, val_async=True))
    assert result.end.best_epoch == 2
    assert same(weights(result, "best"), evaluator.weights[1])
    assert not same(weights(result, "best"), evaluator.weights[2])
    assert header(result, "best")["epoch"] == 2
    assert header(result, "best")["metrics"]["ap"] == 0.9
    assert result.evaluation is not None
    assert result.evaluation.ap == 0.9
    late = list(result.folder.records("evaluation"))
    assert [(line["epoch"], line["evaluation"]["ap"], line["best_ap"]) for line in late] == [
        (1, 0.1, 0.1), (2, 0.9, 0.9), (3, 0.2, 0.9),
    ]  # fmt: skip
    assert [line["evaluation"] is not None for line in result.folder.records("epoch")] == [False, False, False, True]


def test_patience_counts_when_figures_arrive(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator = standing_in(Evaluator(aps=(0.5, 0.4, 0.3, 0.2, 0.1, 0.1)), monkeypatch)
    result = train(options(squares, tmp_path, val_async=True, epochs=9, patience=2))
    assert result.end.reason == "stopped early"
    assert result.end.best_epoch == 1
    assert result.end.epochs in (3, 4), "the figures of epoch 3 arrive at its own end or at that of epoch 4"
    assert len(evaluator.weights) == result.end.epochs, "the last weights are evaluated too"
    evaluated = [line["epoch"] for line in result.folder.epochs() if line["evaluation"]]
    assert evaluated == [*range(1, result.end.epochs + 1)]


@pytest.mark.parametrize("val_async", [True, False])
def test_an_evaluator_that_raises_ends_the_run(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, val_async: bool
) -> None:
    def broken(*arguments: Any, **keywords: Any) -> Any:
        raise UserError("The pictures are gone; bring them back.")

    standing_in(broken, monkeypatch)
    events = Events()
    with pytest.raises(UserError, match="The pictures are gone"):
        train(options(squares, tmp_path, val_async=val_async), [events])
    assert "epoch 3" not in events.seen


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_end_from_outside_stops_an_evaluation_between_two_batches(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    evaluator = standing_in(Evaluator(gated=True), monkeypatch)
    answers: list[Any] = []

    def noting(*arguments: Any, **keywords: Any) -> Any:
        answers.append(evaluator(*arguments, **keywords))
        return answers[-1]

    standing_in(noting, monkeypatch)

    def interrupt(word: str) -> None:
        if word == "step 2.2":
            assert evaluator.begun.wait(60)
            threading.Timer(0.1, evaluator.gate.set).start()
            raise error

    with pytest.raises(error):
        train(options(squares, tmp_path, name="cut", val_async=True), [Events(interrupt)])
    assert answers == [None], "it was stopped, not finished"
    monkeypatch.undo()
    whole = train(options(squares, tmp_path, name="whole", val_async=True))
    point = load_resume_point(tmp_path / "cut" / "weights" / "resume.safetensors")
    assert (point.values["state"]["epoch"], point.values["state"]["awaiting"]) == (1, 1)
    resumed = train(TrainOptions.from_flat({"resume": str(tmp_path / "cut")}))
    assert_same_story(whole, resumed)


def assert_same_story(whole: TrainResult, resumed: TrainResult) -> None:
    """Same weights, same best, and the figures of every epoch once."""
    assert same(weights(whole, "last"), weights(resumed, "last"))
    assert same(weights(whole, "best"), weights(resumed, "best"))
    assert header(whole, "best") == header(resumed, "best")
    assert aps(resumed) == aps(whole)


def aps(result: TrainResult) -> list[tuple[int, float | None]]:
    """Epochs and their AP."""
    return [(line["epoch"], (line["evaluation"] or {}).get("ap")) for line in result.folder.epochs()]


def test_a_snapshot_older_than_the_resume_point_is_evaluated_after_all(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"val_async": True, "val_interval": 2, "epochs": 5}
    evaluator = standing_in(Evaluator(gated=True), monkeypatch)

    def interrupt(word: str) -> None:
        if word == "step 4.1":
            threading.Timer(0.1, evaluator.gate.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, name="cut", **more), [Events(interrupt)])
    file = tmp_path / "cut" / "weights" / "resume.safetensors"
    point = load_resume_point(file)
    assert (point.values["state"]["epoch"], point.values["state"]["awaiting"]) == (3, 2)
    again = standing_in(Evaluator(), monkeypatch)
    resumed = train(TrainOptions.from_flat({"resume": str(tmp_path / "cut")}))
    assert same(again.weights[0], evaluator.weights[0]), "of epoch 2, not of epoch 3"
    monkeypatch.undo()
    assert_same_story(train(options(squares, tmp_path, name="whole", **more)), resumed)
    assert not [key for key in load_resume_point(file).tensors if key.startswith(("awaiting.", "best."))]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Resume points wait for this before they are written."""
    gate = threading.Event()
    save = keeper_module.save_resume_point

    def gated(*arguments: Any) -> None:
        assert gate.wait(60)
        save(*arguments)

    monkeypatch.setattr(keeper_module, "save_resume_point", gated)
    yield gate
    gate.set()


def test_steps_go_on_while_a_checkpoint_is_written(squares: Path, tmp_path: Path, slow_disk: threading.Event) -> None:
    files: list[bool] = []

    def look(word: str) -> None:
        if word == "step 2.3":
            files.append((tmp_path / "slow" / "weights" / "resume.safetensors").exists())
            slow_disk.set()

    events = Events(look)
    result = train(options(squares, tmp_path, name="slow", epochs=2), [events])
    assert files == [False], "three steps were taken while nothing could be written"
    assert {"checkpoint", "checkpoint_wait"} <= events.epochs[1].spans_s.keys()
    assert load_resume_point(result.folder.weights / "resume.safetensors").values["state"]["epoch"] == 2


def test_what_is_written_is_the_epochs_end_and_not_what_came_later(
    squares: Path, tmp_path: Path, slow_disk: threading.Event
) -> None:
    def cut(word: str) -> None:
        if word == "step 2.3":
            slow_disk.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(options(squares, tmp_path, name="cut", epochs=3), [Events(cut)])
    resumed = train(TrainOptions.from_flat({"resume": str(tmp_path / "cut")}))
    assert_same_story(train(options(squares, tmp_path, name="whole", epochs=3)), resumed)


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_full_disk_ends_the_run_with_its_sentence(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, epochs: int
) -> None:
    def full(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    events = Events()
    with pytest.raises(UserError, match=r"Cannot write .*safetensors: No space left on device; free some space"):
        train(options(squares, tmp_path, name="full", epochs=epochs), [events])
    assert "epoch 2" not in events.seen, "it surfaced at the next save, or at the end"
    assert list((tmp_path / "full" / "weights").iterdir()) == []


def test_an_error_of_the_disk_does_not_hide_the_error_of_the_run(
    squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: int) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    def fail(word: str) -> None:
        if word == "step 2.1":
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(options(squares, tmp_path, epochs=3), [Events(fail)])
    assert any("No space left" in message for message in caplog.messages)


def test_last_weights_that_a_kill_left_out_are_written_on_resuming(squares: Path, tmp_path: Path) -> None:
    result = train(options(squares, tmp_path, name="killed", epochs=2))
    whole = weights(result, "last")
    for kind in ("safetensors", "json"):
        (result.folder.weights / f"last.{kind}").unlink()
    result.folder.mark("")  # that a run is done is written last
    resumed = train(TrainOptions.from_flat({"resume": str(result.folder.path)}))
    assert same(weights(resumed, "last"), whole)
    assert header(resumed, "last")["epoch"] == 2
