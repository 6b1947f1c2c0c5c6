"""Convolutions over several maps by kernels on a CUDA device, against torch there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from steps import make_step, run, works
from torch.nn import functional as F

from paceline.models import joint
from paceline.models.blocks import C3k2
from paceline.models.registry import build_model
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
CASES = [
    ((16, 16, 16), 64, (64, 160, 160)),
    ((32, 32), 64, (7, 41, 39)),
    ((128, 256), 256, (16, 20, 20)),
    ((256, 256, 256, 256), 512, (8, 20, 20)),
    ((8, 24, 80, 16), 96, (3, 7, 9)),
    ((80,) * 8, 320, (4, 20, 20)),
    ((8,) * 11, 72, (2, 1, 1)),
    ((40,), 16, (2, 8, 8)),
]


def both_ways(
    widths: tuple[int, ...], out_channels: int, size: tuple[int, int, int], dtype: torch.dtype
) -> list[list[Tensor]]:
    """Result and gradients by kernels, and by torch in double; the last map and y' are slices of wider ones."""
    from paceline.models.operations.fused_joint import convolved

    torch.manual_seed(0)
    images, height, width = size

    def random(channels: int, beside: int = 0) -> Tensor:
        values = torch.randn(images, height, width, channels + beside, device=DEVICE).to(dtype)
        return values.permute(0, 3, 1, 2)[:, beside:]

    maps = [random(channels, 8 * (number == len(widths) - 1)) for number, channels in enumerate(widths)]
    weight = torch.randn(out_channels, sum(widths), 1, 1, device=DEVICE) / sum(widths) ** 0.5
    of_y = random(out_channels, 16)
    found = []
    for by_kernels in (True, False):
        if by_kernels:
            leaves = [values.detach().requires_grad_() for values in (weight, *maps)]
            y = convolved(leaves[0], leaves[1:], dtype)
        else:
            leaves = [values.to(dtype).double().requires_grad_() for values in (weight, *maps)]
            y = F.conv2d(torch.cat(leaves[1:], dim=1), leaves[0])
        gradients = torch.autograd.grad(y, leaves, of_y.to(y.dtype))
        found.append([y.detach(), *gradients])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("widths", "out_channels", "size"), CASES, ids=str)
def test_kernels_are_torch(
    widths: tuple[int, ...], out_channels: int, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    found, expected = both_ways(widths, out_channels, size, dtype)
    again, _ = both_ways(widths, out_channels, size, dtype)
    for number, (value, right, same) in enumerate(zip(found, expected, again, strict=True)):
        bound = 1e-4 if value.dtype is torch.float32 else torch.finfo(dtype).eps
        difference = (value.double() - right).abs().max() / right.abs().max()
        assert float(difference) < bound, number
        assert torch.equal(value, same), "no sum depends on who comes first"
        assert number < 1 or value.dtype == (torch.float32 if number == 1 else dtype)


def test_a_graph_of_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    block = C3k2(32, 64, 1, c3k=True).to(DEVICE, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    shape = (4, 16, 32, 32)
    maps = [torch.randn(shape, device=DEVICE).bfloat16().to(memory_format=torch.channels_last) for _ in range(2)]
    leaves = [*(values.requires_grad_() for values in maps), *block.parameters()]
    taken: list[torch.dtype | None] = []
    asked = joint.type_for_kernels

    def noted(*arguments: object) -> torch.dtype | None:
        taken.append(asked(*arguments))  # type: ignore[arg-type]
        return taken[-1]

    monkeypatch.setattr(joint, "type_for_kernels", noted)

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            y = block(*maps)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
        expected = [values.clone() for values in step()]
    torch.cuda.current_stream().wait_stream(aside)
    assert taken == [torch.bfloat16] * 6
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    graph.replay()
    torch.cuda.synchronize()
    for value, right in zip(found, expected, strict=True):  # torch's own sums may depend on who comes first
        difference = (value.float() - right.float()).abs().max()
        assert float(difference) <= 2e-2 * float(right.float().abs().max()) + 1e-3


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n"])
def test_a_training_by_kernels_is_the_one_without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert usable(DEVICE)
    losses = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        network = build_model(name, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
        if not by_kernels:
            monkeypatch.setattr(joint, "TYPES", frozenset())
        losses.append(torch.stack([value.float() for value in run(step, works(10, "SGD", device="cuda"))]))
        monkeypatch.undo()
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-2, atol=5e-2)
