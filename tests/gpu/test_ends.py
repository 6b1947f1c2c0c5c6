"""The ends of heads by kernels on a CUDA device, against torch there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from steps import make_step, run, works
from torch.nn import functional as F

from paceline.models import ends
from paceline.models.heads import DetectionHead
from paceline.models.registry import build_model
from paceline.triton_kernels import kernels_left_out, usable

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
CASES = [
    (80, 80, 64, ((80, 80), (40, 40), (20, 20))),
    (64, 64, 16, ((80, 80), (40, 40), (20, 20))),
    (96, 64, 7, ((41, 39), (21, 20))),
    (80, 64, 7, ((41, 39), (21, 20))),
    (384, 80, 8, ((40, 40), (20, 20))),
    (128, 144, 3, ((17, 9),)),
    (64, 365, 2, ((40, 40), (3, 1))),
    (64, 3, 16, ((40, 40), (20, 20))),
    (8, 1, 2, ((1, 1), (2, 1))),
]


def both_ways(
    num_in: int, num_out: int, images: int, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> list[list[Tensor]]:
    """Joined points and gradients by kernels, and by torch in double."""
    from paceline.models.operations.fused_ends import ended

    torch.manual_seed(0)
    cells = tuple(height * width for height, width in sizes)
    maps = [torch.randn(images, *size, num_in, device=DEVICE).to(dtype).permute(0, 3, 1, 2) for size in sizes]
    weights = [torch.randn(num_out, num_in, 1, 1, device=DEVICE) / num_in**0.5 for _ in sizes]
    biases = [torch.randn(num_out, device=DEVICE) for _ in sizes]
    of_joined = torch.randn(images, sum(cells), num_out, device=DEVICE).to(dtype)
    leaves = [values.requires_grad_() for values in (*maps, *weights, *biases)]
    empty = torch.full((images, sum(cells), num_out), float("nan"), device=DEVICE, dtype=dtype)
    room = ends.Room(joined=empty, cells=cells)
    levels = enumerate(zip(maps, weights, biases, strict=True))
    joined = room.whole([ended(*three, room.joined, sum(cells[:place])) for place, three in levels])
    found = [[joined.detach(), *torch.autograd.grad(joined, leaves, of_joined)]]

    leaves = [values.detach().to(dtype if values.dim() > 1 else values.dtype).double() for values in leaves]
    leaves = [values.requires_grad_() for values in leaves]
    count = len(sizes)
    levels = zip(leaves[:count], leaves[count : 2 * count], leaves[2 * count :], strict=True)  # type: ignore[assignment]
    right = torch.cat([F.conv2d(*three).flatten(2).transpose(1, 2) for three in levels], dim=1)  # type: ignore[call-overload]
    found.append([right.detach(), *torch.autograd.grad(right, leaves, of_joined.double())])
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_in", "num_out", "images", "sizes"), CASES, ids=str)
def test_kernels_are_torch(
    num_in: int, num_out: int, images: int, sizes: tuple[tuple[int, int], ...], dtype: torch.dtype
) -> None:
    found, expected = both_ways(num_in, num_out, images, sizes, dtype)
    again, _ = both_ways(num_in, num_out, images, sizes, dtype)
    for number, (value, right, same) in enumerate(zip(found, expected, again, strict=True)):
        bound = 1e-4 if number > len(sizes) else torch.finfo(dtype).eps
        difference = (value.double() - right).abs().max() / right.abs().max()
        assert float(difference) < bound, number
        assert torch.equal(value, same), "no sum depends on who comes first"


@pytest.mark.parametrize("num_classes", [3, 80])
def test_a_graph_of_a_head_gives_the_same(num_classes: int) -> None:
    """Each branch on a stream of its own."""
    torch.manual_seed(0)
    head = DetectionHead((64, 128, 256), num_classes, depthwise=True).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    levels = [
        torch.randn(4, width, side, side, device=DEVICE, dtype=torch.bfloat16)
        .to(memory_format=torch.channels_last)
        .requires_grad_()
        for width, side in ((64, 32), (128, 16), (256, 8))
    ]
    leaves = [*levels, *(value for value in head.train().parameters() if value.requires_grad)]
    slopes = [torch.randn(4, 1344, width, device=DEVICE, dtype=torch.bfloat16) for width in (64, num_classes)]

    def step() -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            answers = head(*levels)
        return [*answers, *torch.autograd.grad(answers, leaves, slopes)]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        assert ends.room_for(list(head.cv3), [level.half() for level in levels], 0) is None, "two types"
        step()
        expected = [values.clone() for values in step()]
        with kernels_left_out():
            theirs = step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    for value, right, other in zip(found, expected, theirs, strict=True):  # torch's sums may be in another order
        largest = float(right.float().abs().max())
        assert float((value.float() - right.float()).abs().max()) <= 2e-2 * largest + 1e-3
        assert float((value.float() - other.float()).norm()) <= 5e-2 * float(other.float().norm()) + 1e-3


@pytest.mark.parametrize("name", ["yolo11n", "yolov8n"])
def test_a_training_by_kernels_is_the_one_without(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert usable(DEVICE)
    losses = []
    for by_kernels in (True, False):
        torch.manual_seed(0)
        network = build_model(name, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        step = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
        if not by_kernels:
            monkeypatch.setattr(ends, "TYPES", frozenset())
        losses.append(torch.stack([value.float() for value in run(step, works(10, "SGD", device="cuda"))]))
        monkeypatch.undo()
    torch.testing.assert_close(losses[0], losses[1], rtol=5e-2, atol=5e-2)
