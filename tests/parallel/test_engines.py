"""What engines over several ranks promise beside equal results: memory, refusals, verdicts, delivery, evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from batches import make_batch
from engine_cases import bytes_held, evaluate
from training_runs import Run, train
from worlds import Case, run_world

from paceline.data.shapes import ShapesConfig, ensure
from paceline.parallel.pipeline import batch_of, targets_of
from paceline.parallel.stage import enter, leave

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.evaluation.table import DetectionTable

PIPELINE = Run(engine="data", stages=2, parts=8, images=8, dtype=torch.float32)
_IN_HALF = Run(dtype=torch.float32, amp_dtype=torch.bfloat16, updates=2)
HALF = {
    "half, data": replace(_IN_HALF, engine="data", parts=2),
    "half, shards": replace(_IN_HALF, engine="fsdp", parts=2),
    "half, pipeline": replace(_IN_HALF, engine="data", stages=2),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven images to evaluate, which neither two ranks nor batches of four divide."""
    return ensure(tmp_path_factory.mktemp("shapes"), ShapesConfig(train=2, val=7))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, images: Path) -> dict[str, Any]:
    """What two ranks gave for every case."""
    sharded = Run(engine="fsdp", dtype=torch.float32, optimizer="AdamW", parts=2)
    cases = {
        "bytes": Case("engine_cases", "bytes_held", {"run": sharded}),
        "1f1b": Case("engine_cases", "peak_of_activations", {"run": PIPELINE}),
        "gpipe": Case("engine_cases", "peak_of_activations", {"run": replace(PIPELINE, schedule="gpipe")}),
        "another shape": Case("engine_cases", "another_shape", {"run": PIPELINE}),
        "not finite, pipeline": Case("engine_cases", "not_finite", {"run": PIPELINE}),
        "not finite, data": Case("engine_cases", "not_finite", {"run": Run(engine="data", parts=2)}),
        "feed": Case("engine_cases", "feed", {"world": 2}),
        "evaluation, shares": Case("engine_cases", "evaluate", {"data": images, "world": 2}),
        "evaluation, one image per rank": Case("engine_cases", "evaluate", {"data": images, "world": 2, "batch": 2}),
        "evaluation, assembled": Case("engine_cases", "evaluate", {"data": images, "world": 2, "stages": 2}),
        "evaluation, stages": Case(
            "engine_cases", "evaluate", {"data": images, "world": 2, "stages": 2, "whole": False}
        ),
        "stopped, other": Case("engine_cases", "evaluate", {"data": images, "world": 2, "stopping": 1}),
        "stopped, first": Case("engine_cases", "evaluate", {"data": images, "world": 2, "stopping": 0}),
        "bf16": Case("training_runs", "train", {"run": Run(engine="data", gradients="bf16", dtype=torch.float32)}),
    }
    for kind, run in HALF.items():
        for halved in (True, False):
            cases[f"{kind}, halved {halved}"] = Case("training_runs", "train", {"run": replace(run, halved=halved)})
    return run_world(tmp_path_factory.mktemp("two"), 2, cases)


def test_sharded_ranks_hold_little_more_than_half_of_everything(two: dict[str, Any]) -> None:
    (whole,) = bytes_held(Run(dtype=torch.float32, optimizer="AdamW"))
    assert len(two["bytes"]) == 2
    assert max(two["bytes"]) <= 0.6 * whole
    assert sum(two["bytes"]) >= whole, "and together they hold all of it"


def test_1f1b_keeps_fewer_activations_than_gpipe(two: dict[str, Any]) -> None:
    # Of 8 micro-batches the first of two stages keeps 2 under 1F1B and 8 under GPipe, the second 1 and 8.
    for stage, waiting in ((0, 2), (1, 1)):
        assert two["1f1b"][stage] <= two["gpipe"][stage] * (waiting + 0.5) / 8


def test_another_batch_or_image_size_is_refused_on_every_rank_and_the_run_can_go_on(two: dict[str, Any]) -> None:
    for refusals in two["another shape"]:
        assert len(refusals) == 2
        assert "laid out for 8 images of 64 x 64 px, not 4 images of 64 x 64 px" in refusals[0]
        assert "not 8 images of 96 x 96 px" in refusals[1]


@pytest.mark.parametrize("kind", ["pipeline", "data"])
def test_what_is_not_finite_on_one_rank_stops_the_update_on_all(two: dict[str, Any], kind: str) -> None:
    assert two[f"not finite, {kind}"] == [(0.0, 1.0, True)] * 2


def test_the_first_stage_loads_and_the_last_is_sent_the_ground_truth(two: dict[str, Any]) -> None:
    first, last = two["feed"]
    assert len(first) == 3
    for (shape, target), (other_shape, other_target) in zip(first, last, strict=True):
        assert shape == other_shape == (4, 3, 64, 64)
        assert torch.equal(target, other_target)


@pytest.mark.slow
def test_a_stage_in_the_middle_is_sent_the_shapes_alone(tmp_path: Path) -> None:
    first, middle, last = run_world(tmp_path, 3, {"feed": Case("engine_cases", "feed", {"world": 3})})["feed"]
    for (shape, target), (middle_shape, nothing), (_, other_target) in zip(first, middle, last, strict=True):
        assert middle_shape == shape
        assert nothing.shape == target.shape
        assert nothing.abs().sum() == 0
        assert torch.equal(target, other_target)


@pytest.mark.parametrize("kind", HALF)
def test_weights_that_are_rounded_by_nodes_change_no_bit_of_any_engine(two: dict[str, Any], kind: str) -> None:
    found, expected = two[f"{kind}, halved True"], two[f"{kind}, halved False"]
    assert found.keys() == expected.keys() == {1, 2}
    for number, parts in expected.items():
        assert found[number]["norm"] == parts["norm"] > 0
        for part in ("network", "ema", "optimizer", "losses"):
            for key, value in parts[part].items():
                assert torch.equal(found[number][part][key], value), (number, part, key)


def test_gradients_may_travel_in_bfloat16(two: dict[str, Any]) -> None:
    exact = train(Run(dtype=torch.float32))[1]
    rounded = two["bf16"][1]
    differences = [
        (rounded["network"][key] - value).norm() / value.norm().clamp(min=1e-3)
        for key, value in exact["network"].items()
        if value.is_floating_point()
    ]
    assert 0 < max(differences) < 0.02


@pytest.mark.parametrize("case", ["shares", "one image per rank", "assembled", "stages"])
def test_an_evaluation_by_shares_is_that_of_one_process(two: dict[str, Any], images: Path, case: str) -> None:
    ((record, detections),) = evaluate(images, world=1)
    found, other = two[f"evaluation, {case}"]
    assert other is None
    assert record.ap >= 0
    assert len(detections.scores) > 20
    assert found[0].num_images == record.num_images == 7
    assert sorted(found[1].seen) == sorted(detections.seen) == list(range(7))
    assert found[0].ap == pytest.approx(record.ap, abs=1e-6)
    assert found[0].ap50 == pytest.approx(record.ap50, abs=1e-6)
    assert_same_detections(found[1], detections)


@pytest.mark.parametrize("rank", ["first", "other"])
def test_where_one_rank_stops_no_part_is_scored(two: dict[str, Any], rank: str) -> None:
    assert two[f"stopped, {rank}"] == [None, None]


def assert_same_detections(found: DetectionTable, expected: DetectionTable) -> None:
    for image in range(7):
        mine, theirs = found.of_image(image), expected.of_image(image)
        np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-5)
        np.testing.assert_allclose(mine.boxes, theirs.boxes, atol=1e-2)


def test_ground_truth_travels_in_one_tensor_and_comes_back() -> None:
    batch = make_batch(3)
    back = batch_of(targets_of(batch), batch.size_hw)
    assert torch.equal(back.boxes, batch.boxes)
    assert torch.equal(back.labels, batch.labels)
    assert torch.equal(back.valid, batch.valid)
    assert len(back) == 3
    assert back.size_hw == (64, 64)
    assert back.images.untyped_storage().nbytes() == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_what_crosses_a_boundary_is_contiguous_no_view_and_comes_back(memory_format: torch.memory_format) -> None:
    values = torch.randn(2, 5, 4, 6).to(memory_format=memory_format).requires_grad_(True)
    for sent in (leave(values), leave(values[:, 1:4]), leave(enter(leave(values).detach().requires_grad_(True)))):
        assert sent.is_contiguous()
        assert not sent._is_view()
    sent = leave(values)
    arrived = sent.detach().requires_grad_(True)
    entered = enter(arrived)
    assert torch.equal(entered, values)
    assert entered.is_contiguous(memory_format=torch.channels_last)
    torch.cat((torch.zeros(2, 1, 4, 6), entered), dim=1).square().sum().backward()
    assert arrived.grad is not None
    assert arrived.grad.is_contiguous()
    sent.backward(arrived.grad)
    torch.testing.assert_close(values.grad, 2 * values.detach())
