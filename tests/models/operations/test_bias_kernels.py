"""Gradients of biases by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn import functional as F

from paceline.models.convolution import BiasedConvolution
from paceline.models.heads import DetectionHead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("bias_kernels", "fused_bias") as module:
        yield module


def part_of_points(values: Tensor, *, before: int, after: int) -> Tensor:
    """Return the same BCHW as a piece of joined points BAC, which are NaN else."""
    images, channels, height, width = values.shape
    points = torch.full((images, before + height * width + after, channels), float("nan"), dtype=values.dtype)
    piece = points[:, before : before + height * width]
    piece.copy_(values.flatten(2).transpose(1, 2))
    return piece.transpose(1, 2).unflatten(2, (height, width))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda values: values.contiguous(memory_format=torch.channels_last),
    "piece of points": lambda values: part_of_points(values, before=5, after=2),
    "channels first": lambda values: values.contiguous(),
    "expanded": lambda values: values[:1, :, :1, :1].expand_as(values),
    "every other cell": lambda values: F.interpolate(values, scale_factor=2)[:, :, ::2, ::2],
}
SHAPES = [
    pytest.param((2, 64, 5, 4), id="one block"),
    pytest.param((3, 80, 4, 3), id="five blocks"),
    pytest.param((2, 3, 6, 5), id="three channels"),
    pytest.param((1, 1, 1, 7), id="one channel, one line"),
    pytest.param((2, 72, 3, 1), id="one column"),
    pytest.param((2, 8, 1, 1), id="two cells"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_those_in_double(
    kernels: ModuleType, shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    gradient = LAYOUTS[layout](torch.randn(shape).to(dtype) + 1)
    sums, compact = kernels.sums_over_cells(gradient, launch=kernels.Launch(tile=256, programs=64))
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), gradient.double().sum((0, 2, 3)), rtol=1e-6, atol=1e-5)
    assert torch.equal(compact, gradient)
    assert compact.is_contiguous(memory_format=torch.channels_last)


def test_no_number_is_added_twice_or_left_out(kernels: ModuleType) -> None:
    """Whatever the parts are; sums of whole numbers are exact."""
    gradient = torch.arange(3 * 8 * 35).view(3, 8, 5, 7).float()
    wide = torch.arange(2 * 40 * 15).view(2, 40, 3, 5).float()
    for tile, programs in ((8, 1), (8, 1000), (64, 5), (4096, 3)):
        launch = kernels.Launch(tile=tile, programs=programs)
        assert torch.equal(kernels.sums_over_cells(gradient, launch=launch)[0], gradient.sum((0, 2, 3)))
        launch = kernels.Launch(tile=tile, programs=programs, whole=True)
        sums, compact = kernels.sums_over_cells(wide, launch=launch)
        assert torch.equal(sums, wide.sum((0, 2, 3)))
        assert torch.equal(compact, wide)


def gradients(convolution: BiasedConvolution, x: Tensor, of_y: Tensor, *, amp: bool) -> list[Tensor]:
    """Output and gradients of x, weight and bias."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=amp):
        y = convolution(leaf)
    of_all = torch.autograd.grad(y, (leaf, *convolution.parameters()), of_y.to(y.dtype))
    return [y.detach(), *of_all]


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("kernel", "groups"), [(1, 1), (3, 2)])
def test_a_convolution_is_torchs(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, kernel: int, groups: int, amp: bool
) -> None:
    """In its result, and in the types of all; only the gradient of the bias is of more exact sums."""
    torch.manual_seed(0)
    convolution = BiasedConvolution(8, 12, kernel, padding=kernel // 2, groups=groups)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    of_y = part_of_points(torch.randn(2, 12, 6, 5), before=3, after=1)
    found = []
    for by_kernels in (False, True):
        monkeypatch.setattr("paceline.models.convolution.takes_map", lambda x, answer=by_kernels: answer)
        found.append(gradients(convolution, x, of_y, amp=amp))
    for expected, value in zip(*found, strict=True):
        assert expected.dtype == value.dtype
        torch.testing.assert_close(value, expected, rtol=1e-2 if amp else 1e-5, atol=1e-1 if amp else 1e-5)
    assert torch.equal(found[0][0], found[1][0])
    rounded = of_y.bfloat16() if amp else of_y
    torch.testing.assert_close(found[1][3].double(), rounded.double().sum((0, 2, 3)), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("frozen", ["weight", "bias", "x"])
def test_what_is_frozen_has_no_gradient(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, frozen: str) -> None:
    monkeypatch.setattr("paceline.models.convolution.takes_map", lambda x: True)
    torch.manual_seed(0)
    convolution = BiasedConvolution(8, 4, 1)
    x = torch.randn(2, 8, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    values: dict[str, Any] = {"x": x, "weight": convolution.weight, "bias": convolution.bias}
    values[frozen].requires_grad_(False)
    convolution(x).sum().backward()
    assert {name for name, value in values.items() if value.grad is None} == {frozen}
    if frozen != "bias":
        assert torch.equal(values["bias"].grad, torch.full((4,), 18.0))


def test_a_head_is_the_same_by_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six convolutions, whose gradients are pieces of joined points."""
    torch.manual_seed(0)
    head = DetectionHead((8, 16, 16), 5, depthwise=True).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    levels = [
        torch.randn(2, width, side, side).contiguous(memory_format=torch.channels_last)
        for width, side in ((8, 8), (16, 4), (16, 2))
    ]
    calls: list[torch.Size] = []
    taken = kernels.sums_over_cells

    def counted(gradient: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(gradient.shape)
        assert kernels.pitches_of(gradient) is not None, "is read where it lies"
        sums: tuple[Tensor, Tensor] = taken(gradient)
        return sums

    monkeypatch.setattr(kernels, "sums_over_cells", counted)
    found = []
    for by_kernels in (False, True):
        monkeypatch.setattr("paceline.models.convolution.takes_map", lambda x, answer=by_kernels: answer)
        boxes, logits = head(*levels)
        head.zero_grad()
        (boxes.square().sum() + logits.square().sum()).backward()
        found.append([boxes.detach(), logits.detach(), *(value.grad for value in head.parameters())])
        assert len(calls) == 6 * by_kernels
    for expected, value in zip(*found, strict=True):
        if expected is None:
            assert value is None
        else:
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    head.eval()
    with torch.no_grad():
        head(*levels)
    assert len(calls) == 6
