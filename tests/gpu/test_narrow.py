"""Convolutions of few channels by kernels on a CUDA device, against torch there."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from paceline.models.blocks import ConvUnit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
CASES = [(64, 16, 8, 160, 160, 1), (64, 8, 16, 160, 160, 1), (8, 16, 32, 320, 320, 2), (16, 32, 32, 40, 40, 1)]
CASES += [(3, 32, 64, 21, 13, 1), (3, 64, 32, 21, 13, 1), (2, 8, 24, 7, 300, 1), (2, 32, 16, 33, 17, 2)]
CASES += [(64, 64, 32, 40, 40, 1), (2, 40, 24, 19, 9, 1)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_are_torch(case: tuple[int, ...], dtype: torch.dtype) -> None:
    from paceline.models.operations.narrow_conv import convolved

    images, channels, out_channels, height, width, stride = case
    torch.manual_seed(0)
    x = torch.randn(images, channels, height, width, device=DEVICE, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels, 3, 3, device=DEVICE)
    found = []
    for by_kernels in (True, True, False):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if by_kernels:
            y = convolved(*leaves, stride, dtype)
        else:
            leaves = x.double().requires_grad_(), weight.to(dtype).double().requires_grad_()
            y = F.conv2d(*leaves, stride=stride, padding=1)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape, device=DEVICE).to(dtype).to(y.dtype))
        found.append((y.detach(), leaves[0].grad, leaves[1].grad))
    for value, same, right in zip(*found, strict=True):
        assert value is not None
        assert same is not None
        assert right is not None
        difference = (value.double() - right).abs().max() / right.abs().max()
        assert float(difference) < 2 * torch.finfo(dtype).eps
        if channels <= 32:
            assert torch.equal(value, same), "no sum depends on who comes first"
    if channels <= 32:
        difference = (found[0][2].double() - found[2][2]).abs().max() / found[2][2].abs().max()  # type: ignore[union-attr,operator]
        assert float(difference) < 1e-4, "sums of weights are float32"


def test_units_take_them_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    from paceline.models.operations import narrow_conv

    seen = []
    taken = narrow_conv.convolved
    monkeypatch.setattr(
        narrow_conv, "convolved", lambda *given, **named: seen.append(given[3]) or taken(*given, **named)
    )
    unit = ConvUnit(16, 32, 3).to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 8, 8, device=DEVICE).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert unit(x).dtype is torch.bfloat16
    assert seen == [torch.bfloat16]
    unit(x)
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        unit(x)
    assert len(seen) == 1, "neither in single precision nor without gradients"
