"""The loss on a CUDA device: by kernels and by PyTorch's operations; tests/losses runs the kernels without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from loss_reference import random_scene
from waiting import errors_where_the_host_waits

from paceline.boxes import anchor_points
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PARTS = ("box", "cls", "dfl", "normaliser")
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""One rounding of a gradient in its type, or some in float32."""
COUNTS = (20, 0, 3, 32, 1, 12, 7, 30)


def outputs(
    dtype: torch.dtype, *, num_classes: int = 80, num_padded: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor, Batch]:
    """Raw outputs and a batch of 8 images of 640 px, 8400 points each."""
    raw, scores, batch = random_scene(
        seed, COUNTS, size_hw=(640, 640), num_classes=num_classes, sides=(4.0, 300.0), num_padded=num_padded
    )
    return raw.cuda().to(dtype), scores.cuda().to(dtype), batch.to("cuda")


def sums_and_gradients(raw: Tensor, scores: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    raw, scores = raw.detach().requires_grad_(), scores.detach().requires_grad_()
    sums = DetectionLoss(LossConfig(), scores.shape[-1])((raw, scores), batch)
    gradients = torch.autograd.grad(sums.total, (raw, scores))
    return torch.stack([getattr(sums, part).detach() for part in PARTS]), *gradients


def assigned(raw: Tensor, scores: Tensor, batch: Batch) -> Any:
    from paceline.losses import fused

    points, strides = anchor_points(batch.size_hw, device=raw.device)
    grid = fused.Grid(points=points, strides=strides, size_hw=batch.size_hw, finest=8, num_levels=3)
    return fused.assign(raw, scores, grid, batch, topk=10, least_side_px=16.0)


def by_torch(raw: Tensor, scores: Tensor, batch: Batch) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("paceline.losses.detection.usable", lambda device: False)
        return sums_and_gradients(raw, scores, batch)


def test_the_kernels_can_be_used_here() -> None:
    assert usable(torch.device("cuda"))


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("num_classes", "num_padded"), [(80, 32), (1, 64), (3, 900)])
def test_the_kernels_give_the_loss_of_torchs_operations(dtype: torch.dtype, num_classes: int, num_padded: int) -> None:
    given = outputs(dtype, num_classes=num_classes, num_padded=num_padded)
    found, expected = sums_and_gradients(*given), by_torch(*given)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-4)
    bound = ROUNDING[dtype]
    for gradient, other in zip(found[1:], expected[1:], strict=True):
        assert gradient.dtype == dtype
        # Of two points that are alike to the last digit, one may claim here and the other there.
        differs = (gradient.float() - other.float()).abs() > 1e-5 + bound * other.float().abs()
        assert differs.double().mean() < 1e-5
    assert ((found[1] != 0).any(-1) == (expected[1] != 0).any(-1)).double().mean() > 1 - 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_outputs_give_the_same_bits_and_nothing_waits(dtype: torch.dtype) -> None:
    given = outputs(dtype)
    first = sums_and_gradients(*given)  # kernels are compiled here
    with errors_where_the_host_waits():
        second = sums_and_gradients(*given)
    for value, other in zip(first, second, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("logit", [-85.0, -20.0, -8.0, -1.0, 0.0, 1.0, 8.0, 80.0])
@pytest.mark.parametrize("num_classes", [16, 3])
def test_cross_entropies_and_their_slopes_are_exact_to_what_exponents_allow(logit: float, num_classes: int) -> None:
    _, _, batch = random_scene(0, (0,), size_hw=(96, 160))  # 315 points: no multiple of a vector
    scores = logit + torch.linspace(-0.5, 0.5, 315 * num_classes, device="cuda").view(1, 315, num_classes)
    found = sums_and_gradients(torch.zeros(1, 315, 64, device="cuda"), scores, batch.to("cuda"))
    exact = scores.double()
    bound = 4e-7 * (1 + abs(logit))
    torch.testing.assert_close(
        found[0][1].double(), 0.5 * torch.nn.functional.softplus(exact).sum(), rtol=bound + 1e-6, atol=0
    )
    torch.testing.assert_close(found[2].double(), 0.5 * exact.sigmoid(), rtol=bound + 1e-6, atol=1e-37)


def test_of_equal_boxes_and_points_the_first_claim() -> None:
    _, _, batch = random_scene(0, (8,), size_hw=(640, 640), sides=(100.0, 300.0))
    batch.boxes[:, 1::2] = batch.boxes[:, 0::2]  # pairs that are equal
    raw = torch.zeros(1, 8400, 64)
    raw[..., 5::16] = 8.0
    scores = torch.zeros(1, 8400, 3)
    found = assigned(raw.cuda(), scores.cuda(), batch.to("cuda"))
    owners = found.slot_owner[found.slot_point >= 0]
    assert len(owners) > 10
    assert not (owners % 2).any(), "the second of a pair gets nothing"
    alike = assigned(raw.cuda(), scores.cuda(), batch.to("cuda"))
    assert torch.equal(found.slot_point, alike.slot_point)


def test_a_graph_of_the_loss_follows_its_inputs() -> None:
    raw, scores, batch = outputs(torch.bfloat16)
    other_raw, other_scores, other = outputs(torch.bfloat16, seed=1)
    expected = sums_and_gradients(other_raw, other_scores, other)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sums_and_gradients(raw, scores, batch)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = sums_and_gradients(raw, scores, batch)
    raw.copy_(other_raw)
    scores.copy_(other_scores)
    batch.boxes.copy_(other.boxes)
    batch.labels.copy_(other.labels)
    batch.valid.copy_(other.valid)
    graph.replay()
    for value, wanted in zip(found, expected, strict=True):
        assert torch.equal(value, wanted)
