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
def test_the_gradient_of_the_map_is_that_in_double_and_the_rest_is_torchs(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    from paceline.models.operations.depthwise_conv import convolved

    torch.manual_seed(0)
    x = torch.randn(shape, device=DEVICE, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(shape[1], 1, 3, 3, device=DEVICE)
    of_y = torch.randn(shape, device=DEVICE, dtype=dtype)
    found = []
    for way in ("kernels", "kernels", "torch", "double"):
        if way == "kernels":
            leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
            y = convolved(*leaves, dtype)
        else:
            kind = dtype if way == "torch" else torch.float64
            leaves = x.to(kind, copy=True).requires_grad_(), weight.to(dtype).to(kind).requires_grad_()
            y = F.conv2d(*leaves, padding=1, groups=shape[1])
        y.backward(of_y.to(y.dtype))
        found.append((y.detach(), *(leaf.grad for leaf in leaves)))
    (y, of_x, of_weight), (_, same, _), (torchs_y, _, torchs_weight), (_, exact, _) = found
    assert of_x is not None
    assert same is not None
    assert exact is not None
    difference = (of_x.double() - exact).abs().max() / exact.abs().max()
    assert float(difference) < 2 * torch.finfo(dtype).eps
    assert torch.equal(of_x, same), "the same bits each time"
    torch.testing.assert_close(y, torchs_y)
    assert of_weight is not None
    assert torchs_weight is not None
    assert of_weight.dtype is torch.float32
    difference = (of_weight.to(dtype) - torchs_weight).abs().max() / torchs_weight.abs().max()
    assert float(difference) < 1e-2, "cuDNN's own sums, whose order it does not promise"
