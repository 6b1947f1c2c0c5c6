"""Memory of a real GPU: what fits is found, and what does not is cut."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from batches import NUM_CLASSES, make_batch

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.micro import MicroBatches
from paceline.parallel.single import SingleEngine
from paceline.training.auto_batch import choose
from paceline.training.config import OptimConfig
from paceline.training.optim import plan_optimizer
from paceline.training.peak import DevicePeak
from paceline.training.precision import Precision
from paceline.training.rehearsal import RehearsalMeter
from paceline.training.understudy import Cast

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.models.graph import DetectionModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZE = 320
CUDA = torch.device("cuda:0")


@pytest.fixture
def network() -> DetectionModel:
    torch.manual_seed(0)
    return build_model("yolo11n", NUM_CLASSES).to(CUDA, memory_format=torch.channels_last).train()


@pytest.fixture
def _little_memory(network: DetectionModel) -> Iterator[None]:
    """Let this process have 600 MB more than it holds."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(CUDA).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(CUDA) + 600_000_000) / total, CUDA)
    yield
    torch.cuda.set_per_process_memory_fraction(1.0, CUDA)


def meter(network: DetectionModel) -> RehearsalMeter:
    plan = plan_optimizer(OptimConfig(), num_classes=NUM_CLASSES, updates=20_000, effective_batch=64)
    cast = Cast(
        network=network,
        criterion=DetectionLoss(LossConfig(), NUM_CLASSES),
        optimizer=plan,
        freeze=0,
        clip=10.0,
    )

    def batch(images: int) -> object:
        return make_batch(images, boxes=32, size=SIZE)

    return RehearsalMeter(
        cast=cast,
        precision=Precision(name="fp32"),
        peak=DevicePeak(CUDA),
        training=batch,  # type: ignore[arg-type]
        evaluation=batch,  # type: ignore[arg-type]
    )


@pytest.mark.usefixtures("_little_memory")
def test_a_real_limit_is_met_in_micro_batches(network: DetectionModel) -> None:
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES)
    engine = MicroBatches(SingleEngine(network, criterion, amp_dtype=None, clip=0.0, ledger=Ledger()))
    random = torch.cuda.get_rng_state(CUDA)
    sums = engine.accumulate(make_batch(64, boxes=32, size=SIZE).to(CUDA))
    assert engine.gradient() == 0.0
    assert torch.isfinite(sums.total)
    assert engine._most_px is not None
    assert engine._most_px < 64 * SIZE**2
    assert torch.equal(torch.cuda.get_rng_state(CUDA), random)


def test_memory_rises_on_a_line(network: DetectionModel) -> None:
    """What is predicted for a size that was not tried is what it takes, within a tenth."""
    measure = meter(network)
    choice = choose(measure, room_bytes=1 << 60, most=32, usual=16)
    assert choice.line is not None
    trial = measure(24)
    assert trial is not None
    predicted = choice.line.fixed_bytes + 24 * choice.line.image_bytes
    assert trial.peak_bytes == pytest.approx(predicted, rel=0.1)


@pytest.mark.usefixtures("_little_memory")
def test_what_does_not_fit_is_not_an_error_and_leaves_nothing(network: DetectionModel) -> None:
    measure = meter(network)
    held = measure.peak.held_bytes()
    assert measure(128) is None
    assert measure.peak.held_bytes() <= held + (20 << 20)
    trial = measure(2)
    assert trial is not None
    assert held < trial.peak_bytes <= held + 600_000_000


def test_the_network_stays_as_it_is(network: DetectionModel) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    random = torch.cuda.get_rng_state(CUDA)
    assert meter(network)(4) is not None
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.cuda.get_rng_state(CUDA), random)
