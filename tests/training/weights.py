"""Weights for tests of optimisers: of several shapes and strides, one of which never gets a gradient."""

from __future__ import annotations

import torch
from torch import nn


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    """Three, the first channels-last."""
    generator = torch.Generator().manual_seed(0)
    convolution = torch.randn(4, 3, 3, 3, generator=generator, dtype=dtype)
    return [
        nn.Parameter(convolution.to(memory_format=torch.channels_last)),
        nn.Parameter(torch.randn(7, generator=generator, dtype=dtype)),
        nn.Parameter(torch.randn(1, generator=generator, dtype=dtype)),
    ]


def give_gradients(to: list[nn.Parameter], seed: int) -> None:
    """Give all but the last one a gradient."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in to[:2]:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)


def groups(of: list[nn.Parameter]) -> list[dict[str, object]]:
    """Two groups, the first of which decays."""
    return [{"params": of[:1], "weight_decay": 0.1}, {"params": of[1:], "weight_decay": 0.0}]
