"""Depthwise convolutions by Triton's kernels, under its interpreter, against torch in double precision."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from compiling import run_apart
from torch.nn import functional as F

from paceline.models.blocks import ConvUnit, DepthwiseConv

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from types import ModuleType


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("depthwise_kernels", "depthwise_conv") as module:
        yield module


def differ(found: torch.Tensor | None, expected: torch.Tensor | None) -> float:
    """Return the largest difference, as a share of the largest number."""
    assert found is not None
    assert expected is not None
    return float((found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(2, 16, 9, 7), (1, 8, 20, 12), (3, 80, 5, 4), (2, 128, 3, 3), (1, 8, 1, 1), (1, 24, 1, 9)], ids=str
)
def test_all_three_passes_are_those_in_double(
    kernels: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(shape))
    channels = shape[1]
    x = torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, of_y = torch.randn(channels, 1, 3, 3), torch.randn(shape).to(dtype)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = kernels.convolved(*leaves, dtype, launch=kernels.Launch(tile=256, columns=4, warps=4))
    y.backward(of_y)
    exact = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
    expected = F.conv2d(*exact, padding=1, groups=channels)
    expected.backward(of_y.double())
    bound = 1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert y.dtype == dtype == leaves[0].grad.dtype  # type: ignore[union-attr]
    assert differ(y, expected) < bound
    assert differ(leaves[0].grad, exact[0].grad) < bound
    assert differ(leaves[1].grad, exact[1].grad) < bound
    assert leaves[1].grad.dtype is torch.float32  # type: ignore[union-attr]


def test_numbers_that_do_not_count_are_not_read(kernels: ModuleType) -> None:
    """Beyond an image lie its neighbours: one full of NaN changes nothing in the others."""
    of_y = torch.randn(3, 8, 5, 7).contiguous(memory_format=torch.channels_last)
    filters = torch.randn(9, 8)
    of_y[1] = float("nan")
    of_x = kernels.traced_back(of_y, filters)
    for image in (0, 2):
        assert torch.equal(of_x[image], kernels.traced_back(of_y[image : image + 1], filters)[0])
    assert bool(of_x[1].isnan().all())


def test_gradients_that_nobody_wants_are_not_made(kernels: ModuleType) -> None:
    x, weight = torch.randn(1, 8, 4, 4), torch.randn(8, 1, 3, 3)
    weight.requires_grad_()
    kernels.convolved(x, weight, torch.float32).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    weight = weight.detach()
    x.requires_grad_()
    kernels.convolved(x, weight, torch.float32).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        (DepthwiseConv(16), True),
        (DepthwiseConv(12), False),
        (DepthwiseConv(16, 5), False),
        (ConvUnit(16, 16, 3, 2, groups=16), False),
        (ConvUnit(16, 32, 3, groups=16), False),
        (ConvUnit(16, 16, 3, groups=2), False),
        (ConvUnit(16, 16, 3), True),
        (ConvUnit(16, 16, 3, 2), True),
        (ConvUnit(16, 16, 3, 3), False),
        (ConvUnit(16, 16, 3).eval(), False),
        (ConvUnit(16, 16, 1), False),
    ],
)
def test_only_what_the_kernels_can_do_is_theirs(
    monkeypatch: pytest.MonkeyPatch, unit: ConvUnit, expected: bool
) -> None:
    monkeypatch.setattr("paceline.models.convolution.usable", lambda device: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    x = torch.empty(1, unit.conv.in_channels, 4, 4, dtype=torch.bfloat16, device="meta")
    x = x.contiguous(memory_format=torch.channels_last)
    assert unit.conv._has_kernels(x, torch.bfloat16) is expected  # type: ignore[operator]
    assert not unit.conv._has_kernels(x, torch.float32)  # type: ignore[operator]


_PROGRAM = """
from compiling import compiled

from paceline.models.operations.depthwise_conv import LAUNCH
from paceline.models.operations.depthwise_kernels import _trace_back as kernel

for channels in (16, 64):
    fixed = dict(channels=channels, lines=LAUNCH.tile // channels // LAUNCH.columns, columns=LAUNCH.columns)
    made = compiled(kernel, fixed, dict.fromkeys(("of_y", "filters", "of_x"), "*bf16"), warps=LAUNCH.warps)
    assert "ld.global.v4.b32" in made.asm["ptx"] and "st.global.v4.b32" in made.asm["ptx"], "eight numbers at once"
    assert "ld.global.b16" not in made.asm["ptx"] and "st.global.b16" not in made.asm["ptx"], "and never one by one"
print("compiled")
"""


def test_the_kernels_compile_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
