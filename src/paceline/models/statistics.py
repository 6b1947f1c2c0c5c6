"""Statistics of a network: its parameters and its arithmetic."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.func import functional_call

if TYPE_CHECKING:
    from torch import Tensor


def count_parameters(model: nn.Module) -> int:
    """Count all numbers in parameters, those that are never trained included; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(model: nn.Module, imgsz: int = 640) -> float:
    """10^9 operations for one image of `imgsz` x `imgsz` pixels: twice the multiply-adds of all convolutions.

    Only shapes are computed, on the meta device; the model's tensors and mode are left alone.
    """
    operations = 0

    def count(module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal operations
        convolution = cast("nn.Conv2d", module)
        fan_in = convolution.in_channels // convolution.groups * math.prod(convolution.kernel_size)
        operations += 2 * output.numel() * fan_in

    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, nn.Conv2d)]
    shapes = {name: t.to("meta") for name, t in chain(model.named_parameters(), model.named_buffers())}
    images = torch.empty(1, 3, imgsz, imgsz, device="meta", dtype=next(model.parameters()).dtype)
    try:
        with torch.no_grad():
            functional_call(model, shapes, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return operations / 1e9
