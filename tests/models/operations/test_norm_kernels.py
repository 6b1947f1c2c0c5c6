"""Batch norm and activation by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiling import run_apart
from torch import nn
from torch.nn import functional as F

from paceline.models.blocks import Bottleneck, ConvUnit, SplitChain
from paceline.models.operations.pitch import pitch_of
from paceline.parallel.norms import BatchNorm, BatchStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType
    from typing import Self

EPS = 1e-3


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("moment_kernels", "norm_kernels", "fused_norm") as module:
        yield module


class Case:
    """A map, and what it is normalised with."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: torch.dtype, *, mean: float = 2.0) -> None:
        torch.manual_seed(sum(shape))
        channels = shape[1]
        values = torch.randn(shape) * torch.rand(channels).add(0.1).view(1, -1, 1, 1) + mean
        self.y = values.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        self.weight = torch.rand(channels).add(0.5).requires_grad_()
        self.bias = torch.randn(channels).requires_grad_()
        self.latest = (torch.full((channels,), 9.0), torch.full((channels,), 9.0))
        self.of_z = torch.randn(shape).to(dtype)

    def expected(self, *, silu: bool) -> tuple[Self, torch.Tensor]:
        """Compute by torch, in double."""
        other = object.__new__(type(self))
        for name in ("y", "weight", "bias"):
            setattr(other, name, getattr(self, name).detach().double().requires_grad_())
        other.latest = tuple(torch.zeros_like(other.weight, requires_grad=False) for _ in range(2))  # type: ignore[assignment]
        normed = F.batch_norm(other.y, *other.latest, other.weight, other.bias, True, 1.0, EPS)
        z = F.silu(normed) if silu else normed
        z.backward(self.of_z.double())
        return other, z


def launches(kernels: ModuleType, tile: int) -> dict[str, Any]:
    """Return small tiles, of unlike sizes for sums and results, and loads of three turns under way."""
    of_sums = kernels.Launch(tile=tile, warps=4, stages=3, programs=64)
    return {"of_sums": of_sums, "of_results": kernels.Launch(tile=2 * tile, warps=4)}


def differ(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Return the largest difference, as a share of the largest number."""
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


SHAPES = [
    pytest.param((2, 16, 9, 7), id="plain"),
    pytest.param((3, 80, 5, 4), id="five blocks of channels"),
    pytest.param((2, 8, 16, 16), id="few channels"),
    pytest.param((1, 20, 3, 5), id="channels that no block divides"),
    pytest.param((2, 1, 3, 3), id="one channel"),
    pytest.param((2, 192, 1, 1), id="two rows"),
    pytest.param((1, 72, 1, 9), id="one line"),
]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_is_double_up_to_rounding(
    kernels: ModuleType, shape: tuple[int, int, int, int], silu: bool
) -> None:
    case = Case(shape, torch.float32)
    (z,) = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=silu, **launches(kernels, 256)
    )
    z.backward(case.of_z)
    expected, expected_z = case.expected(silu=silu)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert differ(z, expected_z) < 1e-5
    for found, right in zip(case.latest, expected.latest, strict=True):
        assert differ(found, right) < 1e-5
    assert differ(case.y.grad, expected.y.grad) < 2e-5
    assert differ(case.weight.grad, expected.weight.grad) < 1e-5
    assert differ(case.bias.grad, expected.bias.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_at_the_end_alone(kernels: ModuleType, dtype: torch.dtype) -> None:
    case = Case((2, 16, 12, 12), dtype)
    (z,) = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=True, **launches(kernels, 512)
    )
    z.backward(case.of_z)
    expected, expected_z = case.expected(silu=True)
    bound = torch.finfo(dtype).eps
    torch.testing.assert_close(z.detach().double(), expected_z.detach(), rtol=bound, atol=1e-5)
    assert differ(case.y.grad, expected.y.grad) < bound
    assert differ(case.weight.grad, expected.weight.grad) < 1e-5  # of sums nothing is lost
    assert z.dtype == case.y.grad.dtype == dtype  # type: ignore[union-attr]


def test_the_variance_of_large_values_is_not_lost(kernels: ModuleType) -> None:
    """A sum of squares of numbers around 1,000 would keep no digit of a variance of a hundredth."""
    case = Case((4, 8, 16, 16), torch.float32, mean=1000.0)
    kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=False, **launches(kernels, 128)
    )
    expected = case.y.detach().double().var((0, 2, 3))
    assert differ(case.latest[1], expected) < 1e-4


@pytest.mark.parametrize("first", [0, 3, 8])
def test_a_gradient_that_is_part_of_a_wider_map_is_read_where_it_lies(kernels: ModuleType, first: int) -> None:
    case = Case((2, 16, 5, 6), torch.float32)
    wide = torch.full((2, 28, 5, 6), float("nan")).contiguous(memory_format=torch.channels_last)
    wide[:, first : first + 16] = case.of_z
    part = wide[:, first : first + 16]
    assert pitch_of(part) == 28
    (z,) = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=True, **launches(kernels, 256)
    )
    z.backward(part)
    expected, _ = case.expected(silu=True)
    assert differ(case.y.grad, expected.y.grad) < 2e-5
    assert differ(case.weight.grad, expected.weight.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [16, 80, 256])
def test_halves_are_the_halves_and_their_gradients_may_lie_anywhere(
    kernels: ModuleType, channels: int, dtype: torch.dtype
) -> None:
    case = Case((2, channels, 5, 6), dtype)
    halves = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=True, pieces=2, **launches(kernels, 512)
    )
    expected, expected_z = case.expected(silu=True)
    bound = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    for half, right in zip(halves, expected_z.chunk(2, dim=1), strict=True):
        assert half.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(half.detach().double(), right.detach(), rtol=bound, atol=1e-5)
    first, second = case.of_z.chunk(2, dim=1)
    wide = torch.full((2, channels + 8, 5, 6), float("nan"), dtype=dtype).contiguous(memory_format=torch.channels_last)
    wide[:, 8 : 8 + channels // 2] = second
    torch.autograd.backward(halves, (first, wide[:, 8 : 8 + channels // 2]))
    assert differ(case.y.grad, expected.y.grad) < 2 * bound
    assert differ(case.weight.grad, expected.weight.grad) < 1e-5
    assert differ(case.bias.grad, expected.bias.grad) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("channels", "first"), [(16, 0), (16, 8), (20, 4)])
def test_what_is_carried_past_is_added_and_has_the_gradient_of_the_result(
    kernels: ModuleType, channels: int, first: int, dtype: torch.dtype
) -> None:
    case = Case((2, channels, 5, 6), dtype)
    wide = torch.randn(2, channels + 12, 5, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    part = wide[:, first : first + channels]
    (z,) = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=True, carried=part, **launches(kernels, 256)
    )
    z.backward(case.of_z)
    expected, expected_z = case.expected(silu=True)
    bound = 1e-5 if dtype is torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(z.detach().double(), expected_z.detach() + part.detach().double(), rtol=bound, atol=1e-5)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert differ(case.y.grad, expected.y.grad) < 2 * bound
    assert wide.grad is not None
    assert torch.equal(wide.grad[:, first : first + channels], case.of_z)
    assert wide.grad.count_nonzero() == case.of_z.count_nonzero()


def test_a_half_that_nobody_uses_has_no_gradient(kernels: ModuleType) -> None:
    case = Case((2, 16, 5, 6), torch.float32)
    _, second = kernels.normed_and_activated(
        case.y, case.weight, case.bias, case.latest, eps=EPS, silu=True, pieces=2, **launches(kernels, 512)
    )
    case.of_z[:, :8] = 0
    second.backward(case.of_z[:, 8:])
    expected, _ = case.expected(silu=True)
    assert differ(case.y.grad, expected.y.grad) < 2e-5


class Small(nn.Module):
    """Units with and without an activation, and pieces that are cut and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ConvUnit(3, 16, 3, 2)
        self.chain = SplitChain(16, 16, 8, [Bottleneck(8, 8, residual=True)])
        self.last = ConvUnit(16, 5, activation=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B3HW to B5."""
        return self.last(self.chain(self.first(x))).mean((2, 3))


def trained(monkeypatch: pytest.MonkeyPatch, *, by_kernels: bool) -> dict[str, Any]:
    """Two parts of an update of a small network: outputs, gradients, running statistics."""
    torch.manual_seed(0)
    network = Small().to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    statistics = BatchStatistics(network)
    monkeypatch.setattr(BatchNorm, "_has_kernels", lambda norm, x: by_kernels)
    found: dict[str, Any] = {}
    for number in range(2):
        images = torch.rand(2, 3, 16, 16).contiguous(memory_format=torch.channels_last)
        with statistics.part():
            found[f"output {number}"] = output = network(images)
        output.square().sum().backward()
    statistics.commit()
    found |= {f"gradient of {name}": value.grad for name, value in network.named_parameters()}
    found |= network.state_dict()
    network.eval()
    found["answer"] = network(torch.rand(2, 3, 16, 16))
    return found


def test_a_network_is_the_same_by_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    taken = kernels.normed_and_activated

    def counted(*arguments: Any, silu: bool, **named: Any) -> tuple[torch.Tensor, ...]:
        calls.append(silu)
        return taken(*arguments, silu=silu, **named)

    monkeypatch.setattr(kernels, "normed_and_activated", counted)
    found = trained(monkeypatch, by_kernels=True)
    assert calls == [True, True, True, True, True, False] * 2
    expected = trained(monkeypatch, by_kernels=False)
    assert len(calls) == 12
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


_PROGRAM = """
from compiling import compiled

from paceline.models.operations import moment_kernels, norm_kernels

kinds = dict.fromkeys(("y", "z", "carried", "of_y"), "*bf16") | dict(eps="fp32")
floats = ("parts", "moments", "joined", "kept", "weight", "bias", "of_affine", "sums", "latest_mean", "latest_variance")
kinds |= dict.fromkeys(floats, "*fp32")
numbers = ("num_rows", "num_channels", "piece_channels", "num_parts", "num_first", "num_second", "carried_pitch")
kinds |= dict.fromkeys(numbers, "i32")
of_tiles = dict(rows=32, channels=64, step=8)
of_sums = of_tiles | dict(stages=3)
variants = [
    (norm_kernels._statistics, of_sums),
    (norm_kernels._settle_statistics, dict(parts_room=512, channels=8)),
    (moment_kernels._join_moments, dict(parts=32, channels=32)),
    (norm_kernels._apply, of_tiles | dict(silu=True, ptx=True, adds=False)),
    (norm_kernels._apply, of_tiles | dict(silu=True, ptx=True, adds=True)),
    *(
        (norm_kernels._gradient_sums, of_sums | dict(silu=True, pieces=pieces, room=room, ptx=True))
        for pieces, room in ((1, 1), (1, 3), (2, 1), (2, 2))
    ),
    (norm_kernels._settle_sums, dict(parts_room=512, channels=8)),
    (norm_kernels._apply_gradient, of_tiles | dict(silu=True, pieces=1, ptx=True)),
    (norm_kernels._apply_gradient, of_tiles | dict(silu=True, pieces=2, ptx=True)),
    (norm_kernels._apply, dict(rows=256, channels=8, step=8, silu=True, ptx=False, adds=False)),
    (norm_kernels._apply_gradient, dict(rows=256, channels=8, step=8, silu=True, pieces=2, ptx=False)),
    (norm_kernels._apply_gradient, dict(rows=32, channels=64, step=1, silu=False, pieces=1, ptx=True)),
]
for kernel, fixed in variants:
    places = fixed.get("pieces", 1) * fixed.get("room", 1)
    of_gradients = dict(gradients=("*bf16",) * places, pitches=("i32",) * places, totals=("*bf16",) * places)
    made = compiled(kernel, fixed, kinds | of_gradients)
    if fixed.get("step") == 8:
        wide = "cp.async.cg" if fixed.get("stages", 1) > 1 else "ld.global.v4.b32"
        assert wide in made.asm["ptx"], "eight channels are loaded at once"
        assert "st.global.b16" not in made.asm["ptx"], "and never written one by one"
        if "_apply" in kernel.fn.__name__:
            assert "ld.global.b32" not in made.asm["ptx"], "what belongs to channels neither"
print("compiled")
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
