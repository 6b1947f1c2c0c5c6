"""The engine computes the gradient of the one big batch, however it is cut."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from batches import NUM_CLASSES, make_batch
from batches import rows as part

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.single import SingleEngine

if TYPE_CHECKING:
    from paceline.batch import Batch


def engine(network: torch.nn.Module, *, clip: float = 0.0, loss_scale: float = 1.0) -> SingleEngine:
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES)
    return SingleEngine(network, criterion, amp_dtype=None, clip=clip, ledger=Ledger(), loss_scale=loss_scale)


class InDouble(torch.nn.Module):
    """A network that computes in float64 whatever it is given."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner.double()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs: tuple[torch.Tensor, ...] = self.inner(images.double())
        return outputs


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    """yolo11n in eval mode, so that no statistics of a micro-batch come in; those it has are of real activations."""
    torch.manual_seed(0)
    made = build_model("yolo11n", NUM_CLASSES).train()
    for module in made.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        made(make_batch(8, seed=1).network_input())
    return InDouble(made.eval())


def gradients(
    network: torch.nn.Module, batches: list[Batch], *, clip: float = 0.0, loss_scale: float = 1.0
) -> dict[str, torch.Tensor]:
    copied = copy.deepcopy(network)
    runner = engine(copied, clip=clip, loss_scale=loss_scale)
    for batch in batches:
        runner.accumulate(batch)
    assert runner.gradient().item() == 0.0
    return {name: value.grad for name, value in copied.named_parameters() if value.grad is not None}


def norm(values: dict[str, torch.Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([value.norm() for value in values.values()])))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, relative: float) -> None:
    """Compare within `relative` of the norm of the whole gradient."""
    assert found.keys() == expected.keys()
    bound = relative * norm(expected)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= bound, name


@pytest.mark.parametrize("cuts", [[3, 3], [1, 5], [2, 2, 2], [5, 1]])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    network: torch.nn.Module, cuts: list[int], clip: float
) -> None:
    batch = make_batch(6)
    parts, start = [], 0
    for size in cuts:
        parts.append(part(batch, slice(start, start + size)))
        start += size
    assert_close(gradients(network, parts, clip=clip), gradients(network, [batch], clip=clip), relative=1e-10)


def test_the_gradient_is_that_of_the_mean_loss_times_the_images(network: torch.nn.Module) -> None:
    batch = make_batch(4)
    copied = copy.deepcopy(network)
    sums = DetectionLoss(LossConfig(), NUM_CLASSES)(copied(batch.network_input()), batch)
    (len(batch) * sums.total / sums.normaliser.clamp(min=1)).backward()
    expected = {name: value.grad for name, value in copied.named_parameters() if value.grad is not None}
    assert_close(gradients(network, [batch]), expected, relative=1e-10)


def test_clipping_bounds_the_norm_and_keeps_the_direction(network: torch.nn.Module) -> None:
    batch = make_batch(4)
    free, clipped = gradients(network, [batch]), gradients(network, [batch], clip=0.1)
    assert norm(free) > 0.2
    assert norm(clipped) == pytest.approx(0.1, rel=1e-3)
    assert_close({name: value * (0.1 / norm(free)) for name, value in free.items()}, clipped, relative=1e-3)


def test_the_loss_scale_leaves_no_trace(network: torch.nn.Module) -> None:
    batch = make_batch(2)
    assert_close(gradients(network, [batch], loss_scale=64.0), gradients(network, [batch]), relative=1e-10)


def test_batches_without_any_box_train_the_classes_only(network: torch.nn.Module) -> None:
    empty = part(make_batch(3), slice(2, 3))
    found = gradients(network, [empty])
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["inner.model.23.cv3.0.2.bias"].abs().sum() > 0
    assert found["inner.model.23.cv2.0.2.bias"].abs().sum() == 0


def test_a_gradient_that_is_not_finite_is_reported(network: torch.nn.Module) -> None:
    copied = copy.deepcopy(network)
    with torch.no_grad():
        next(copied.parameters()).fill_(float("nan"))
    runner = engine(copied)
    runner.accumulate(make_batch(2))
    assert runner.gradient().item() == 1.0


@pytest.mark.parametrize(("before", "now"), [(1.0, 1.0), (64.0, 64.0), (64.0, 1.0), (1.0, 64.0)])
def test_what_is_pending_can_be_saved_and_put_back(network: torch.nn.Module, before: float, now: float) -> None:
    """Also where the precision, and with it the scale of the loss, is another one then."""
    batch = make_batch(4)
    first, second = part(batch, slice(0, 2)), part(batch, slice(2, 4))
    undisturbed = gradients(network, [first, second])
    runner = engine(copy.deepcopy(network), loss_scale=before)
    runner.accumulate(first)
    saved = {name: value.clone() for name, value in runner.pending().items()}
    copied = copy.deepcopy(network)
    resumed = engine(copied, loss_scale=now)
    resumed.load_pending(saved)
    resumed.accumulate(second)
    resumed.gradient()
    found = {name: value.grad for name, value in copied.named_parameters() if value.grad is not None}
    assert_close(found, undisturbed, relative=1e-10)
    assert resumed.pending() == {}
