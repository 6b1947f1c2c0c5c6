"""Half weights: what autocast would compute with, to the bit, in fewer operations."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.models.blocks import Bottleneck, ConvUnit
from paceline.models.operations.half_weights import half_of, halved, numbers_of
from paceline.models.registry import build_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

HALF = [torch.bfloat16, torch.float16]


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def by_autocast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave weights to autocast."""
    with monkeypatch.context() as patch:
        patch.setattr("paceline.models.operations.half_weights.autocast_type", lambda values: None)
        yield


def trained(
    dtype: torch.dtype, *, frozen: int = 0, at_once: bool = False
) -> tuple[list[Tensor], dict[str, Tensor | None], Counter[str]]:
    """Outputs and gradients of a network, and the operations that it took."""
    torch.manual_seed(0)
    network = build_model("yolo11n", 3).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    for node in list(network.model.values())[:frozen]:
        node.requires_grad_(False)
    images = torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with Counting() as counting:
        with torch.autocast("cpu", dtype=dtype), halved(network) if at_once else nullcontext():
            outputs = network(images)
        sum(output.float().square().sum() for output in outputs).backward()  # type: ignore[union-attr]
    gradients = {name: value.grad for name, value in network.named_parameters()}
    return [output.detach() for output in outputs], gradients, counting.counts


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("dtype", HALF)
def test_a_network_is_the_same_to_the_bit_in_fewer_operations(
    dtype: torch.dtype, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, gradients, counts = trained(dtype, at_once=at_once)
    with by_autocast(monkeypatch):
        expected, of_autocast, counts_of_autocast = trained(dtype)
    assert all(torch.equal(found, right) for found, right in zip(outputs, expected, strict=True))
    for name, right in of_autocast.items():
        found = gradients[name]
        assert (found is None) == (right is None), name
        if found is not None and right is not None:
            assert torch.equal(found, right), name
            assert found.stride() == right.stride(), name
    together = counts["aten._foreach_copy_.default"]
    assert (together == 2) if at_once else (20 <= together <= 2 * 24), "one for each node, and one back"
    alone = counts_of_autocast["aten._to_copy.default"] - counts["aten._to_copy.default"]
    assert alone > 150, "one for each weight, and one back"


def test_frozen_weights_take_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    _, gradients, _ = trained(torch.bfloat16, frozen=5)
    with by_autocast(monkeypatch):
        _, expected, _ = trained(torch.bfloat16, frozen=5)
    assert {name for name, value in gradients.items() if value is None} == {
        name for name, value in expected.items() if value is None
    }
    assert all(value is None or torch.equal(value, gradients[name]) for name, value in expected.items())  # type: ignore[arg-type]


def test_of_a_network_what_is_compiled_is_left_alone() -> None:
    network = build_model("yolo11n", 3).train()
    node = network.model["3"]
    node.compile(backend="eager")
    of_node = {id(value) for value in node.parameters()}
    weights = [module.weight for module in network.modules() if isinstance(module, nn.Conv2d)]
    with torch.autocast("cpu", dtype=torch.bfloat16), halved(network):
        assert {id(weight) for weight in weights if half_of(weight, torch.bfloat16) is weight} == of_node & {
            id(weight) for weight in weights
        } | {id(weight) for weight in weights if not weight.requires_grad}


def test_a_node_of_a_network_takes_the_copies_of_that() -> None:
    network = build_model("yolo11n", 3).train()
    node = network.model["0"]
    weight = weight_of(node)  # type: ignore[arg-type]
    with torch.autocast("cpu", dtype=torch.bfloat16), halved(network):
        copy = half_of(weight, torch.bfloat16)
        with halved(node):
            assert half_of(weight, torch.bfloat16) is copy
        assert half_of(weight, torch.bfloat16) is copy
    assert half_of(weight, torch.bfloat16) is weight


def weight_of(unit: ConvUnit) -> nn.Parameter:
    return unit.conv.weight


def test_copies_are_there_for_their_node_alone() -> None:
    node, other = Bottleneck(8, 8, residual=False).train(), ConvUnit(8, 8).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with halved(node):
            inside = half_of(weight_of(node.cv1), torch.bfloat16)
            assert inside.dtype == torch.bfloat16
            assert inside.requires_grad
            assert half_of(weight_of(node.cv1), torch.float16) is weight_of(node.cv1), "of another type there is none"
            assert half_of(weight_of(node.cv1), None) is weight_of(node.cv1)
            assert half_of(weight_of(other), torch.bfloat16) is weight_of(other)
            numbers = numbers_of(weight_of(node.cv1), torch.bfloat16)
            assert numbers.data_ptr() == inside.data_ptr()
            assert not numbers.requires_grad
        assert half_of(weight_of(node.cv1), torch.bfloat16) is weight_of(node.cv1)
        with pytest.raises(ValueError, match="in the middle"), halved(node):
            raise ValueError("in the middle")
        assert half_of(weight_of(node.cv1), torch.bfloat16) is weight_of(node.cv1)


def test_a_gradient_may_go_to_the_weight_itself() -> None:
    """As by kernels that sum it in float32: what is half of it and half of the copy's is added up."""
    node = ConvUnit(4, 4).train()
    with torch.autocast("cpu", dtype=torch.bfloat16), halved(node):
        copy = half_of(weight_of(node), torch.bfloat16)
    (weight_of(node).sum() + 2 * copy.float().sum()).backward()
    assert torch.equal(weight_of(node).grad, torch.full_like(weight_of(node), 3.0))  # type: ignore[arg-type]
    weight_of(node).grad = None
    weight_of(node).sum().backward()
    assert torch.equal(weight_of(node).grad, torch.ones_like(weight_of(node)))  # type: ignore[arg-type]


@pytest.mark.parametrize("way", ["no autocast", "evaluation", "no gradients", "double", "compiled"])
def test_all_else_is_left_alone(way: str) -> None:
    node: nn.Module = ConvUnit(4, 4).train()
    if way == "evaluation":
        node.eval()
    if way == "double":
        node.double()
    if way == "compiled":
        node.compile(backend="eager")
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=way != "no autocast"),
        torch.set_grad_enabled(way != "no gradients"),
        halved(node),
    ):
        weight = weight_of(node)  # type: ignore[arg-type]
        assert half_of(weight, torch.bfloat16) is weight
