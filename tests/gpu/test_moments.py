"""Moments that convolutions write on the way, on a CUDA device: against torch's own of the map that is stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from steps import make_step, run, works

from paceline.models.blocks import ConvUnit
from paceline.models.operations.moments import Moments, Tally
from paceline.models.registry import build_model
from paceline.parallel.norms import BatchNorm, BatchStatistics
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]


def image_of(*shape: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    """Return numbers around a mean, channels-last."""
    torch.manual_seed(0)
    values = torch.randn(shape, device=DEVICE) + mean
    return values.to(dtype).contiguous(memory_format=torch.channels_last)


def convolved(case: tuple[int, ...], dtype: torch.dtype, mean: float = 0.5) -> tuple[Tensor, Moments]:
    """Convolve by kernels; a case is images, channels (of each of several maps), filters, height, width, stride."""
    from paceline.models.operations import fused_joint, fused_stem, narrow_conv

    images, *channels, filters, height, width, stride = case
    tally = Tally()
    maps = [image_of(images, count, height, width, dtype=dtype, mean=mean) for count in channels]
    side = 3 if len(maps) == 1 else 1
    weight = torch.randn(filters, sum(channels), side, side, device=DEVICE) / sum(channels) ** 0.5
    weight.requires_grad_()
    if len(maps) > 1:
        y = fused_joint.convolved(weight, maps, dtype, tally=tally)
    elif channels == [3]:
        y = fused_stem.convolved(maps[0], weight, stride=stride, dtype=dtype, tally=tally)
    else:
        y = narrow_conv.convolved(maps[0], weight, stride, dtype, tally=tally)
    assert tally.moments is not None
    return y.detach(), tally.moments


CASES = [(64, 3, 16, 640, 640, 2), (8, 3, 64, 320, 320, 2), (2, 3, 32, 37, 45, 2), (1, 3, 16, 9, 10, 1)]
CASES += [(64, 16, 32, 320, 320, 2), (64, 8, 16, 160, 160, 1), (16, 32, 32, 40, 40, 1), (3, 32, 64, 21, 13, 1)]
CASES += [(64, 64, 32, 40, 40, 1), (3, 64, 32, 21, 13, 1)]
CASES += [(64, 16, 16, 16, 64, 160, 160, 1), (64, 64, 64, 64, 128, 40, 40, 1), (2, 256, 128, 256, 20, 20, 1)]
CASES += [(3, 24, 8, 200, 19, 17, 1), (1, 8, 8, 8, 1, 1, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_moments_are_those_of_what_is_stored(case: tuple[int, ...], dtype: torch.dtype) -> None:
    y, moments = convolved(case, dtype)
    mean, variance, count = moments.joined()
    cells = y.permute(0, 2, 3, 1).flatten(0, 2)
    right_variance, right_mean = torch.var_mean(cells.double(), 0, correction=0)
    assert float(count) == len(cells)
    scale = float(right_variance.sqrt().max() + right_mean.abs().max())
    torch.testing.assert_close(mean.double(), right_mean, rtol=1e-5, atol=2e-6 * scale)
    torch.testing.assert_close(variance.double(), right_variance, rtol=1e-4, atol=1e-10)
    again, others = convolved(case, dtype)
    assert torch.equal(y, again)
    assert torch.equal(moments.table, others.table), "no sum depends on who comes first"


@pytest.mark.parametrize("case", [(4, 3, 16, 64, 64, 2), (4, 8, 16, 64, 64, 1), (4, 8, 8, 16, 64, 64, 1)], ids=str)
def test_a_mean_that_is_large_costs_no_digits_of_the_variance(case: tuple[int, ...]) -> None:
    y, moments = convolved(case, torch.float16, mean=200.0)
    _, variance, _ = moments.joined()
    right = y.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(variance.double(), right, rtol=1e-3, atol=1e-6)


def unit_of(kind: str) -> tuple[ConvUnit, list[Tensor]]:
    """Return a unit of a kind, whose norm takes moments, and what it takes."""
    torch.manual_seed(1)
    sizes = {"stem": (3, 16, 3, 2), "narrow": (16, 32, 3, 2), "joint": (48, 64)}[kind]
    unit = ConvUnit(*sizes).to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    BatchStatistics(unit)
    widths = {"stem": [3], "narrow": [16], "joint": [16, 8, 24]}[kind]
    return unit, [image_of(8, width, 160, 160, dtype=torch.bfloat16, mean=0.3) for width in widths]


def answer(unit: ConvUnit, maps: list[Tensor]) -> list[Tensor]:
    """Return the result, the latest statistics, and the gradients of a unit."""
    unit.zero_grad(set_to_none=True)
    leaves = [values.detach().requires_grad_(values.shape[1] > 3) for values in maps]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        z = unit.joined(*leaves)
    torch.manual_seed(2)
    z.backward(torch.randn(z.shape, device=DEVICE).to(z.dtype))
    assert isinstance(unit.bn, BatchNorm)
    gradients = [values.grad for values in (*leaves, *unit.parameters()) if values.grad is not None]
    return [value.detach().clone() for value in (z, *unit.bn.latest, *gradients)]


@pytest.mark.parametrize("kind", ["stem", "narrow", "joint"])
def test_a_unit_is_the_one_whose_norm_looks_at_the_map(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    unit, maps = unit_of(kind)
    found = answer(unit, maps)
    monkeypatch.setattr(BatchNorm, "takes_moments", lambda norm: False)
    for value, right in zip(found, answer(unit, maps), strict=True):
        bound = 1e-3 if value.dtype is torch.float32 else 2 * torch.finfo(value.dtype).eps
        difference = (value.float() - right.float()).abs().max() / right.float().abs().max()
        assert bool(torch.isfinite(value).all())
        assert float(difference) < bound


@pytest.mark.parametrize("kind", ["stem", "narrow", "joint"])
def test_a_graph_replays_them_for_other_numbers(kind: str) -> None:
    unit, maps = unit_of(kind)
    assert isinstance(unit.bn, BatchNorm)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.autocast("cuda", dtype=torch.bfloat16):
        unit.joined(*maps)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.autocast("cuda", dtype=torch.bfloat16):
        z = unit.joined(*maps)
    for values in maps:
        values.mul_(3).add_(1)
    graph.replay()
    found = [value.clone() for value in (z, *unit.bn.latest)]
    with torch.autocast("cuda", dtype=torch.bfloat16):
        right = [unit.joined(*maps), *unit.bn.latest]
    for value, other in zip(found, right, strict=True):
        assert torch.equal(value, other)


def test_a_training_by_moments_is_the_one_without(monkeypatch: pytest.MonkeyPatch) -> None:
    assert usable(DEVICE)
    losses = []
    for by_moments in (True, False):
        torch.manual_seed(0)
        network = build_model("yolo11n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
        if not by_moments:
            monkeypatch.setattr(BatchNorm, "takes_moments", lambda norm: False)
        losses.append(torch.stack([value.float() for value in run(step, works(10, "SGD", device="cuda"))]))
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-2, atol=5e-2)
