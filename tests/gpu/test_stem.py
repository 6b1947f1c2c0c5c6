"""The convolution of images by kernels on a CUDA device, against torch there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paceline.models.blocks import ConvUnit
from paceline.models.registry import build_model
from paceline.models.stem import StemConvolution
from paceline.parallel.norms import BatchNorm, BatchStatistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
CASES = [(64, 16, 640, 640, 2), (8, 32, 640, 480, 2), (4, 64, 320, 320, 2), (2, 96, 160, 160, 2), (2, 80, 96, 64, 2)]
CASES += [(3, 16, 37, 53, 2), (3, 8, 21, 13, 1), (2, 16, 64, 64, 1), (1, 32, 1, 1, 2), (2, 24, 30, 22, 2)]


@pytest.mark.parametrize("of_images", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_torch(case: tuple[int, ...], dtype: torch.dtype, of_images: torch.dtype | None) -> None:
    from paceline.models.operations.fused_stem import convolved

    images, filters, height, width, stride = case
    torch.manual_seed(0)
    x = torch.rand(images, height, width, 3, device=DEVICE, dtype=of_images or dtype).permute(0, 3, 1, 2)
    weight = torch.randn(filters, 3, 3, 3, device=DEVICE).requires_grad_()
    factors = weight.detach().to(dtype).double().requires_grad_()
    expected = F.conv2d(x.to(dtype).double(), factors, stride=stride, padding=1)
    wide = torch.randn(images, *expected.shape[2:], filters + 8, device=DEVICE).to(dtype).permute(0, 3, 1, 2)
    of_y = wide[:, 8:]
    (of_weight_expected,) = torch.autograd.grad(expected, factors, of_y.double())
    found = []
    for _ in range(2):
        y = convolved(x, weight, stride=stride, dtype=dtype)
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
        found.append((y.detach(), *torch.autograd.grad(y, weight, of_y)))
    (y, of_weight), again = found
    assert torch.equal(y, again[0])
    assert torch.equal(of_weight, again[1]), "no sum depends on who comes first"
    expected = expected.detach()
    assert float((y.double() - expected).abs().max() / expected.abs().max()) < torch.finfo(dtype).eps
    difference = (of_weight.double() - of_weight_expected).abs().max() / of_weight_expected.abs().max()
    assert float(difference) < 1e-4, "sums of weights are float32"


def test_single_precision_is_exact() -> None:
    from paceline.models.operations.fused_stem import Launch, convolved

    small = Launch(groups=16, filters=8, warps=4, stages=2, programs=64)
    torch.manual_seed(0)
    x = torch.rand(2, 34, 46, 3, device=DEVICE).permute(0, 3, 1, 2)
    weight = torch.randn(16, 3, 3, 3, device=DEVICE).requires_grad_()
    y = convolved(x, weight, stride=2, dtype=torch.float32, forward=small, backward=small)
    expected = F.conv2d(x.double(), weight.double(), stride=2, padding=1)
    of_y = torch.randn_like(y)
    (of_weight,) = torch.autograd.grad(y, weight, of_y)
    (of_weight_expected,) = torch.autograd.grad(expected, weight, of_y.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_weight, of_weight_expected, rtol=1e-4, atol=1e-4)


def test_a_graph_of_it_is_the_same() -> None:
    unit = StemConvolution(3, 16, 3, 2).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(4, 64, 96, 3, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = unit(x)
        return y.detach(), *torch.autograd.grad(y.float().square().sum(), unit.weight)  # type: ignore[return-value]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        x.uniform_()
        graph.replay()
        for value, right in zip(captured, step(), strict=True):
            assert torch.equal(value, right)


def test_networks_take_them_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.models.operations import fused_stem

    types: list[torch.dtype] = []
    taken = fused_stem.convolved

    def noted(x: torch.Tensor, weight: torch.Tensor, *, dtype: torch.dtype, **named: Any) -> torch.Tensor:
        types.append(dtype)
        return taken(x, weight, dtype=dtype, **named)

    monkeypatch.setattr(fused_stem, "convolved", noted)
    network = build_model("yolo11n", 3).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.rand(2, 64, 64, 3, device=DEVICE).permute(0, 3, 1, 2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        network(x)
    assert types == [torch.bfloat16]
    network(x)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        network(x)
    assert len(types) == 1, "neither in single precision nor without gradients"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_unit_learns_what_it_learns_by_torch(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    found = []
    x = torch.rand(8, 128, 160, 3, device=DEVICE).permute(0, 3, 1, 2)
    for by_kernels in (True, False):
        torch.manual_seed(0)
        unit = ConvUnit(3, 16, 3, 2).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
        if not by_kernels:
            monkeypatch.setattr(StemConvolution, "_has_stem_kernels", lambda stem, x: False)
        with torch.autocast("cuda", dtype=dtype):
            y = unit(x)
        (y.float() * torch.randn(y.shape, device=DEVICE)).sum().backward()
        assert unit.conv.weight.grad is not None
        found.append((y.detach().float(), unit.conv.weight.grad))
    for one, other in zip(*found, strict=True):
        assert float((one - other).abs().max() / other.abs().max()) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("filters", [16, 32, 48, 8])
@pytest.mark.parametrize("size", [(640, 640), (37, 53)], ids=str)
def test_the_gradient_that_a_norm_leaves_is_the_one_that_it_writes(
    monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], filters: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    unit = ConvUnit(3, filters, 3, 2)
    nn.init.uniform_(unit.bn.weight, 0.5, 1.5)  # type: ignore[arg-type]
    nn.init.normal_(unit.bn.bias)  # type: ignore[arg-type]
    whole = nn.Sequential(unit).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    BatchStatistics(whole)
    x = torch.rand(4, *size, 3, device=DEVICE).permute(0, 3, 1, 2)
    of_z = torch.randn(4, *((side + 1) // 2 for side in size), filters, device=DEVICE).permute(0, 3, 1, 2).to(dtype)
    found = []
    for by_moments in (True, True, False):
        if not by_moments:
            monkeypatch.setattr(BatchNorm, "takes_moments", lambda norm: False)
        with torch.autocast("cuda", dtype=dtype):
            z = whole(x)
        found.append(torch.autograd.grad(z, list(whole.parameters()), of_z))
    for one, same, written in zip(*found, strict=True):
        assert torch.equal(one, same), "no sum depends on who comes first"
        assert float((one - written).abs().max() / written.abs().max()) < 1e-3
