"""Pools, biases and upsampling by kernels on a CUDA device, against torch there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from steps import make_step, run, works
from torch.nn import functional as F

from paceline.models.blocks import SPPF, Upsample
from paceline.models.convolution import BiasedConvolution
from paceline.models.registry import build_model
from paceline.triton_kernels import takes_map, usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 128, 20, 20), (2, 24, 13, 7), (5, 8, 1, 9), (3, 64, 1, 1), (1, 256, 40, 40)]


def random_map(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Noise, channels-last, full of ties in half precision."""
    torch.manual_seed(seed)
    return torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def with_gradient(operation: Callable[[Tensor], Tensor], x: Tensor, of_y: Tensor) -> tuple[Tensor, Tensor]:
    """Result, and gradient of the input."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = operation(leaf)
    y.backward(of_y)
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def pools_by_torch(x: Tensor) -> Tensor:
    """Join a map with three pools, each of the one before."""
    pieces = [x]
    for _ in range(3):
        pieces.append(F.max_pool2d(pieces[-1], 5, 1, 2))
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pools_are_torchs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """The results to the last bit, and the gradient where its sums are exact; else to rounding."""
    from paceline.models.operations.fused_pool import pyramid

    images, channels, height, width = shape
    x = random_map(shape, dtype)
    whole = torch.randint(-1, 2, (images, 4 * channels, height, width), device=DEVICE)
    whole = whole.to(torch.float32).contiguous(memory_format=torch.channels_last)
    whole[:, :channels] = 0
    whole[:, 2 * channels :] = 0  # of one pool: sums of at most 25 ones are exact in every type
    noise = random_map((images, 4 * channels, height, width), dtype, seed=1)
    joined, of_x = with_gradient(lambda x: pyramid(x, 3), x, whole.to(dtype))
    expected, right = with_gradient(pools_by_torch, x.float(), whole)
    assert torch.equal(joined.float(), expected)
    assert torch.equal(of_x.float(), right)
    _, of_x = with_gradient(lambda x: pyramid(x, 3), x, noise)
    _, again = with_gradient(lambda x: pyramid(x, 3), x, noise)
    assert torch.equal(of_x, again)
    _, right = with_gradient(pools_by_torch, x.float(), noise.float())
    bound = 1e-5 if dtype is torch.float32 else 3 * torch.finfo(dtype).eps
    assert float((of_x.float() - right).abs().max() / right.abs().max()) < bound


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("special", [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0])
def test_what_is_no_number_is_chosen_as_on_cpus(special: float, dtype: torch.dtype) -> None:
    from paceline.models.operations.fused_pool import pyramid

    x = random_map((2, 16, 9, 11), dtype).round()
    x[torch.rand(x.shape, device=DEVICE) < 0.3] = special
    of_joined = torch.randint(-1, 2, (2, 32, 9, 11), device=DEVICE).to(dtype)
    joined, of_x = with_gradient(lambda x: pyramid(x, 1), x, of_joined)
    leaf = x.cpu().requires_grad_()
    expected = torch.cat((leaf, F.max_pool2d(leaf, 5, 1, 2)), dim=1)
    expected.backward(of_joined.cpu())
    torch.testing.assert_close(joined.cpu(), expected.detach(), rtol=0, atol=0, equal_nan=True)
    assert leaf.grad is not None
    assert torch.equal(of_x.cpu(), leaf.grad)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(64, 80, 80, 80), (64, 64, 20, 20), (3, 3, 7, 9), (1, 1, 1, 1)], ids=str)
def test_sums_over_cells_are_those_in_double(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from paceline.models.operations.fused_bias import sums_over_cells

    images, channels, height, width = shape
    points = random_map((images, channels, 1, 40 + height * width), dtype)
    piece = points[:, :, 0, 40:].unflatten(2, (height, width))
    for gradient in (piece, piece.contiguous(memory_format=torch.channels_last), piece.contiguous()):
        sums, compact = sums_over_cells(gradient)
        expected = gradient.double().sum((0, 2, 3))
        assert float((sums - expected).abs().max()) < 1e-5 * float(gradient.double().abs().sum((0, 2, 3)).max())
        assert torch.equal(compact, gradient)
        assert compact.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(sums, sums_over_cells(gradient)[0])


@pytest.mark.parametrize("amp", [False, True])
def test_a_convolution_with_bias_is_torchs(monkeypatch: pytest.MonkeyPatch, amp: bool) -> None:
    torch.manual_seed(0)
    convolution = BiasedConvolution(64, 80, 1).to(DEVICE)
    x, of_y = random_map((8, 64, 40, 40), torch.float32), random_map((8, 80, 40, 40), torch.float32, seed=1)
    found = []
    for by_kernels in (True, False):
        if not by_kernels:
            monkeypatch.setattr("paceline.models.convolution.takes_map", lambda x: False)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=amp):
            y = convolution(leaf)
        found.append((y.detach(), *torch.autograd.grad(y, (leaf, *convolution.parameters()), of_y.to(y.dtype))))
    assert takes_map(x)
    for value, expected in zip(*found, strict=True):
        assert value.dtype == expected.dtype
        bound = 2e-2 if amp else 2e-3  # torch's convolutions in float32 may be in TF32
        assert float((value - expected).abs().max() / expected.abs().max()) < bound


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_upsampling_is_torchs(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from paceline.models.operations.doubling import doubled_map

    images, channels, height, width = shape
    wide = random_map((images, channels + 8, 2 * height, 2 * width), dtype, seed=1)
    doubled, of_x = with_gradient(doubled_map, random_map(shape, dtype), wide[:, 8:])
    assert torch.equal(doubled, F.interpolate(random_map(shape, dtype), scale_factor=2, mode="nearest"))
    expected = 4 * F.avg_pool2d(wide[:, 8:].double(), 2)
    torch.testing.assert_close(of_x.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_a_training_by_kernels_is_the_one_without(
    monkeypatch: pytest.MonkeyPatch, amp_dtype: torch.dtype | None
) -> None:
    assert usable(DEVICE)
    losses = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        network = build_model("yolo11n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=amp_dtype)
        if not by_kernels:
            monkeypatch.setattr("paceline.models.blocks.takes_map", lambda x: False)
            monkeypatch.setattr("paceline.models.convolution.takes_map", lambda x: False)
        losses.append(torch.stack([value.float() for value in run(step, works(10, "SGD", device="cuda"))]))
    bound = 2e-3 if amp_dtype is None else 5e-2
    torch.testing.assert_close(losses[0], losses[1], rtol=bound, atol=bound)


@pytest.mark.parametrize("make", [lambda: SPPF(64, 64), lambda: Upsample(), lambda: BiasedConvolution(64, 16, 1)])
def test_a_graph_computes_the_same(make: Callable[[], nn.Module]) -> None:
    """Nothing waits for the device, and shapes are fixed."""
    torch.manual_seed(0)
    block = make().to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    x = random_map((4, 64, 20, 20), torch.float32).requires_grad_()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(block(x).square().sum(), (x, *block.parameters())))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [value.clone() for value in gradients()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = gradients()
    graph.replay()
    for value, right in zip(found, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-3, atol=1e-3)
