"""Kernels that come while the one before them ends, on a CUDA device: they see all that was written before them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from steps import make_step, works
from steps import run as run_steps

from paceline import triton_kernels
from paceline.models import order
from paceline.models.fused_norm import normed_and_activated
from paceline.models.registry import build_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < triton_kernels.LEAST_EARLY_CAPABILITY,
        reason="needs a GPU that lets kernels come early",
    ),
]

SHAPES = [(8, 64, 20, 20), (64, 16, 80, 80), (2, 256, 40, 40), (64, 128, 80, 80)]


def test_they_come_early_here() -> None:
    assert triton_kernels.usable(torch.device("cuda"))
    assert triton_kernels._overlaps_on(torch.cuda.current_device())


def chain(shape: tuple[int, ...], links: int = 12) -> Callable[[], list[Tensor]]:
    """Norms in a row, each of which needs what the one before has written, and their gradients."""
    torch.manual_seed(0)
    y = torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    y.requires_grad_()
    affine = [torch.rand(shape[1], device="cuda").add_(0.5).requires_grad_() for _ in range(2)]
    latest = (torch.empty(shape[1], device="cuda"), torch.empty(shape[1], device="cuda"))
    of_z = torch.randn_like(y)

    def run() -> list[Tensor]:
        for leaf in (y, *affine):
            leaf.grad = None
        z = y
        for _ in range(links):
            (z,) = normed_and_activated(z, *affine, latest, eps=1e-3, silu=True)
            z = torch.relu(z + 0.25)  # kernels of torch's between ours
        z.backward(of_z)
        return [z.detach(), *(leaf.grad for leaf in (y, *affine) if leaf.grad is not None)]

    return run


@pytest.mark.parametrize("shape", SHAPES)
def test_early_kernels_give_the_same_bits(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = chain(shape)
    early = [[value.clone() for value in run()] for _ in range(5)]
    launched = [start for start in triton_kernels._launchers.values() if getattr(start, "_known", None)]
    assert launched
    monkeypatch.setattr(triton_kernels, "_overlaps_on", lambda number: False)
    monkeypatch.setattr(triton_kernels, "_launchers", {})
    one_by_one = run()
    for found in early:
        assert all(torch.equal(value, right) for value, right in zip(found, one_by_one, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_graph_of_early_kernels_gives_the_same_bits(shape: tuple[int, ...]) -> None:
    run = chain(shape)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = [value.clone() for value in run()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for _ in range(20):
        for value in found:
            value.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(value, right) for value, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_order_changes_rounding_alone(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    run = chain(shape, links=2)
    against = [value.clone() for value in run()]
    monkeypatch.setattr(order, "AGAINST", False)
    for value, right in zip(run(), against, strict=True):
        torch.testing.assert_close(value.float(), right.float(), rtol=3e-2, atol=3e-2 * float(right.abs().max()))


def test_early_kernels_train_a_network_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of all families between those of torch and cuDNN; an update's bits show in all losses after it."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)

    def trained() -> list[list[float]]:
        torch.manual_seed(0)
        network = build_model("yolov8n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
        return [said.tolist() for said in run_steps(step, works(8, device="cuda"))]

    early = [trained() for _ in range(3)]
    monkeypatch.setattr(triton_kernels, "_overlaps_on", lambda number: False)
    monkeypatch.setattr(triton_kernels, "_launchers", {})
    assert early == [trained()] * 3
