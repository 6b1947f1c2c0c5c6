"""Depthwise convolutions by kernels on a CUDA device, against torch there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
SHAPES = [(64, 80, 80, 80), (16, 128, 20, 20), (3, 8, 33, 17), (2, 512, 20, 20), (1, 24, 1, 300)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_are_torch(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    from paceline.models.depthwise_conv import convolved

    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, 3, 3, device=DEVICE)
    of_y = torch.randn(shape, device=DEVICE, dtype=dtype)
    found = []
    for by_kernels in (True, True, False):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if by_kernels:
            y = convolved(*leaves, dtype)
        else:
            leaves = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
            y = F.conv2d(*leaves, padding=1, groups=shape[1])
        y.backward(of_y.to(y.dtype))
        found.append((y.detach(), leaves[0].grad, leaves[1].grad))
    for value, _, right in zip(*found, strict=True):
        assert value is not None
        assert right is not None
        difference = (value.double() - right).abs().max() / right.abs().max()
        assert float(difference) < 2 * torch.finfo(dtype).eps
    assert torch.equal(found[0][1], found[1][1]), "the same bits each time"  # type: ignore[arg-type]
