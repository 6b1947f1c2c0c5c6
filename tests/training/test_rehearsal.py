"""A rehearsal leaves the run as it is, and is a whole step."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.batch import Batch
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.config import OptimConfig
from paceline.training.optim import plan_optimizer
from paceline.training.precision import Precision
from paceline.training.rehearsal import Rehearsal, RehearsalMeter
from paceline.training.understudy import Cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.models.graph import DetectionModel

NUM_CLASSES = 3
FP32 = Precision(name="fp32")


def make_batch(images: int, size: int = 64) -> Batch:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 40.0]]).expand(images, 32, 4)
    return Batch(
        images=torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8, generator=torch.Generator()),
        boxes=boxes,
        labels=torch.zeros(images, 32, dtype=torch.int64),
        valid=torch.ones(images, 32, dtype=torch.bool),
        samples=torch.arange(images),
        original_hw=torch.full((images, 2), size),
    )


@pytest.fixture(scope="module")
def network() -> DetectionModel:
    torch.manual_seed(0)
    return build_model("yolo11n", NUM_CLASSES)


def cast(network: DetectionModel, *, freeze: int = 0) -> Cast:
    plan = plan_optimizer(OptimConfig(), num_classes=NUM_CLASSES, updates=20_000, effective_batch=64)
    return Cast(
        network=network,
        criterion=DetectionLoss(LossConfig(), NUM_CLASSES),
        optimizer=plan,
        freeze=freeze,
        clip=10.0,
    )


@dataclass
class FakePeak:
    """Counts how often work is done; every peak is the next of a list."""

    peaks: list[int]

    def held_bytes(self) -> int:
        return 100

    def free_bytes(self) -> int:
        return 10**9

    def of(self, work: Callable[[], None]) -> int:
        work()
        return self.peaks.pop(0)


def meter(network: DetectionModel, peaks: list[int], **more: object) -> RehearsalMeter:
    return RehearsalMeter(
        cast=cast(network),
        precision=FP32,
        peak=FakePeak(peaks),
        training=make_batch,
        evaluation=make_batch,
        **more,  # type: ignore[arg-type]
    )


def test_the_run_stays_as_it_is(network: DetectionModel) -> None:
    network.eval()
    network.model.get_submodule("0").train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    kinds = [type(module) for module in network.modules()]
    random = torch.get_rng_state()
    assert meter(network, [1, 1])(2) is not None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert [type(module) for module in network.modules()] == kinds
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_step_moves_everything_that_training_moves(network: DetectionModel) -> None:
    rehearsal = Rehearsal(cast(network, freeze=2), FP32)
    copied, ema = rehearsal.eager.engine.network, rehearsal.eager.ema.network
    before, average = copy.deepcopy(copied.state_dict()), copy.deepcopy(ema.state_dict())
    for _ in range(2):
        rehearsal.step(make_batch(2))
    moved = {name for name, value in copied.state_dict().items() if not torch.equal(value, before[name])}
    assert "model.23.cv3.0.2.bias" in moved
    assert "model.5.bn.running_mean" in moved
    assert not any(name.startswith(("model.0.", "model.1.")) for name in moved)
    assert any(not torch.equal(value, average[name]) for name, value in ema.state_dict().items())
    assert rehearsal.eager.optimizer.state


@pytest.mark.parametrize(
    ("peaks", "more", "expected"),
    [
        ([500, 300], {}, 500),
        ([500, 900], {}, 900),
        ([500, 300], {"beside": True}, 500 + 300 - 100),
        ([500, 300], {"further_bytes": 10}, 520),
    ],
)
def test_room_for_evaluation(network: DetectionModel, peaks: list[int], more: dict[str, object], expected: int) -> None:
    trial = meter(network, peaks, **more)(2)
    assert trial is not None
    assert (trial.images, trial.peak_bytes) == (2, expected)
    assert trial.seconds > 0


def test_exhausted_memory_is_an_answer_and_other_failures_are_not(network: DetectionModel) -> None:
    found = meter(network, [])
    errors: list[BaseException] = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes differ")]

    def fail(work: Callable[[], None]) -> int:
        raise errors.pop(0)

    found.peak.of = fail  # type: ignore[method-assign]
    assert found(2) is None
    with pytest.raises(RuntimeError, match="shapes differ"):
        found(2)
