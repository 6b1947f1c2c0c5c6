"""Nearest upsampling by Triton's kernels, under its interpreter, against torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn import functional as F

from paceline.models.blocks import Concat, Upsample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from types import ModuleType

    from torch import Tensor


@pytest.fixture(scope="module")
def kernels(operations: Callable[..., AbstractContextManager[ModuleType]]) -> Iterator[ModuleType]:
    """Return the module that launches the kernels, which Triton's interpreter runs."""
    with operations("doubling_kernels", "doubling") as module:
        yield module


def random_map(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise, channels-last."""
    torch.manual_seed(seed)
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


SHAPES = [(2, 16, 5, 7), (1, 24, 4, 3), (3, 8, 1, 6), (2, 64, 3, 1), (3, 8, 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_cell_goes_to_four_and_their_gradients_come_back(
    kernels: ModuleType, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    images, channels, height, width = shape
    x = random_map(shape, dtype).requires_grad_()
    of_doubled = random_map((images, channels, 2 * height, 2 * width), dtype, seed=1)
    tile = kernels.Tile(numbers=256, warps=4)
    doubled = kernels.doubled_map(x, tile=tile, gradient_tile=tile)
    doubled.backward(of_doubled)
    assert torch.equal(doubled, F.interpolate(x, scale_factor=2, mode="nearest"))
    assert doubled.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.dtype == doubled.dtype == dtype
    expected = 4 * F.avg_pool2d(of_doubled.double(), 2)
    torch.testing.assert_close(x.grad.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("way", ["slice", "odd slice", "channels first", "expanded"])
def test_maps_and_gradients_may_lie_anywhere(kernels: ModuleType, way: str) -> None:
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "slice": lambda values: torch.cat((values, values + 1, values), dim=1)[:, 8:16],
        "odd slice": lambda values: torch.cat((values, values), dim=1)[:, 3:11],
        "channels first": lambda values: values.contiguous(),
        "expanded": lambda values: values[:1, :1, :1, :1].expand_as(values),
    }
    x = ways[way](random_map((2, 8, 4, 3), torch.float32)).detach().requires_grad_()
    of_doubled = ways[way](random_map((2, 8, 8, 6), torch.float32, seed=1))
    doubled = kernels.doubled_map(x)
    doubled.backward(of_doubled)
    assert torch.equal(doubled, F.interpolate(x, scale_factor=2, mode="nearest"))
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 4 * F.avg_pool2d(of_doubled, 2))


@pytest.mark.parametrize("channels", [16, 12])
def test_a_block_is_the_same_by_kernels(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, channels: int) -> None:
    """Where eight divides the channels; else it does without them. Its gradient is a piece of a joined map's."""
    calls: list[torch.Size] = []
    taken = kernels.doubled_map

    def counted(x: Tensor) -> Tensor:
        calls.append(x.shape)
        doubled: Tensor = taken(x)
        return doubled

    monkeypatch.setattr(kernels, "doubled_map", counted)
    beside = random_map((2, 24, 6, 8), torch.float32)
    found = []
    for by_kernels in (False, True):
        monkeypatch.setattr("paceline.models.blocks.takes_map", lambda x, answer=by_kernels: answer)
        x = random_map((2, channels, 3, 4), torch.float32, seed=1).requires_grad_()
        joined = Concat()(Upsample()(x), beside)
        joined.square().sum().backward()
        assert x.grad is not None
        found.append((joined.detach(), x.grad))
    assert len(calls) == (channels == 16)
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    Upsample().eval()(x)
    assert len(calls) < 2
