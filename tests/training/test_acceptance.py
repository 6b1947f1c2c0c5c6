"""Kernels on trial: what only rounds passes, and whatever else they do to a step is named."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss, LossSums
from paceline.models.registry import build_model
from paceline.training import acceptance
from paceline.training.acceptance import compared, objection, too_far
from paceline.training.precision import Precision

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor

    from paceline.models.graph import DetectionModel

IMAGES, SIDE = 2, 96
BF16 = Precision(name="bf16")


def network_of(name: str = "yolo11n", seed: int = 0) -> tuple[DetectionModel, DetectionLoss]:
    torch.manual_seed(seed)
    network = build_model(name, 3)
    return network, DetectionLoss(LossConfig(), 3, strides=network.strides)


def left_out() -> bool:
    return triton_kernels._are_left_out.get()


class Otherwise(torch.autograd.Function):
    """Forward as it is or changed; backward a changed gradient."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.change = backward
        return forward(value.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.change(gradient.clone()), None, None


def as_it_is(value: Tensor) -> Tensor:
    return value


def without_a_row(value: Tensor) -> Tensor:
    """Forget the last row of the last image, as a kernel that counts one piece too few."""
    value[-1, :, -1] = 0
    return value


def with_a_nan(value: Tensor) -> Tensor:
    value[0, 0, 0, 0] = float("nan")
    return value


def louder(value: Tensor) -> Tensor:
    return value * 1.3


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "a map": (without_a_row, as_it_is),
    "a gradient": (as_it_is, without_a_row),
    "no number": (with_a_nan, as_it_is),
    "no gradient": (as_it_is, with_a_nan),
    "scale": (as_it_is, louder),
}


@contextmanager
def kernels_do(network: DetectionModel, node: str, fault: str) -> Iterator[None]:
    """Let a module compute something else wherever kernels are not left out, in copies of the network as well."""
    forward, backward = FAULTS[fault]

    def hook(module: nn.Module, given: Any, result: Tensor) -> Tensor:
        return result if left_out() else Otherwise.apply(result, forward, backward)

    handle = network.get_submodule(node).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_computed_twice_passes(name: str, precision: str) -> None:
    network, criterion = network_of(name)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert compared(network, criterion, Precision.named(precision), images=IMAGES, side=SIDE) == ""
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(value.grad is None for value in network.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_rounding_in_another_order_passes(seed: int) -> None:
    network, criterion = network_of(seed=seed)
    generator, rounded = torch.Generator().manual_seed(seed), set()

    def hook(module: nn.Module, given: Any, result: Tensor) -> Tensor:
        """Round once more, up or down by chance."""
        if left_out():
            return result
        rounded.add(module)
        noise = torch.rand(result.shape, generator=generator) - 0.5
        return result + (result.detach().float() * noise * 2**-8).to(result.dtype)

    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook)
    assert compared(network, criterion, BF16, images=IMAGES, side=SIDE) == ""
    assert len(rounded) > 80


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("node", ["model.0.conv", "model.9", "model.22"])
def test_a_fault_anywhere_is_named(node: str, fault: str) -> None:
    network, criterion = network_of()
    with kernels_do(network, node, fault):
        found = compared(network, criterion, BF16, images=IMAGES, side=SIDE)
    assert "away from single precision" in found


def test_a_statistic_and_a_loss_are_looked_at_by_themselves() -> None:
    network, criterion = network_of()

    def hook(unit: Any, given: Any, result: Tensor) -> None:
        """Spoil the variance that the norm has just kept."""
        if not left_out():
            unit.bn.latest[1].data.mul_(1.5)

    network.get_submodule("model.5").register_forward_hook(hook)
    assert compared(network, criterion, BF16, images=IMAGES, side=SIDE).startswith("variance of model.5.bn is")

    class Loss(DetectionLoss):
        def __call__(self, predictions: tuple[Tensor, ...], batch: Any) -> LossSums:
            sums = super().__call__(predictions, batch)
            return sums if left_out() else replace(sums, cls=sums.cls * 0.5)

    network, _ = network_of()
    spoiled = Loss(LossConfig(), 3, strides=network.strides)
    assert compared(network, spoiled, BF16, images=IMAGES, side=SIDE).startswith("the loss is")


def test_a_kernel_that_cannot_be_started_is_named_and_a_lack_of_memory_is_no_fault_of_its() -> None:
    network, criterion = network_of()
    failure: list[Exception] = [RuntimeError("The kernel _apply cannot be started here")]

    def hook(module: nn.Module, given: Any) -> None:
        if not left_out():
            raise failure[0]

    network.get_submodule("model.5").register_forward_pre_hook(hook)
    found = compared(network, criterion, BF16, images=IMAGES, side=SIDE)
    assert found == "node 5 fails with them (RuntimeError: The kernel _apply cannot be started here)"
    failure[0] = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    with pytest.raises(torch.OutOfMemoryError):
        compared(network, criterion, BF16, images=IMAGES, side=SIDE)


def test_what_is_far_from_the_exact_is_measured_by_how_far_torch_is() -> None:
    exact = {f"gradient of {name}": torch.ones(100) for name in "abc"}

    def apart(share: float) -> dict[str, Tensor]:
        return {name: value * (1 + share) for name, value in exact.items()}

    assert too_far(apart(0.009), apart(0.0), exact) == ""
    assert too_far(apart(0.1), apart(0.08), exact) == ""
    assert too_far(apart(0.1), apart(0.05), exact).startswith(
        "each from gradient of a to gradient of c, on average, is 0.1 of"
    )
    assert too_far(apart(0.009) | {"gradient of b": torch.zeros(100)}, apart(0.2), exact).startswith(
        "gradient of b is 1 of"
    )
    assert too_far({name: value * float("nan") for name, value in exact.items()}, apart(0.5), exact)


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was compared, where kernels can be used; the next finding is the last entry of the list given back."""
    findings: list[str] = []
    monkeypatch.setattr(acceptance, "usable", lambda device: True)
    monkeypatch.setattr(acceptance, "compile_ahead", lambda *given: None)
    monkeypatch.setattr(acceptance, "mark", lambda what, *given: tmp_path / "marks" / what)

    def compare(*given: Any) -> str:
        found = findings.pop()
        if found.startswith("RuntimeError"):
            raise RuntimeError(found)
        return found

    monkeypatch.setattr(acceptance, "compared", compare)
    return findings


def test_what_has_passed_is_not_tried_again_and_what_has_not_is(as_on_a_gpu: list[str]) -> None:
    network, criterion = network_of()
    as_on_a_gpu += ["", "RuntimeError: CUDA out of memory. Tried", "a tensor is 2 of itself away"]
    assert objection(network, criterion, BF16) == "a tensor is 2 of itself away"
    assert objection(network, criterion, BF16) == "", "where there is no room, nothing is known"
    assert objection(network, criterion, BF16) == ""
    assert as_on_a_gpu == []
    assert objection(network, criterion, BF16) == "", "remembered"


def test_where_kernels_cannot_be_used_nothing_is_tried() -> None:
    assert objection(*network_of(), BF16) == ""


def test_a_device_that_is_not_trusted_has_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "_works_on", lambda number: True)
    monkeypatch.setattr(triton_kernels, "_distrusted", set())
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert triton_kernels.usable(first)
    triton_kernels.distrust(first)
    assert not triton_kernels.usable(first)
    assert triton_kernels.usable(second)
