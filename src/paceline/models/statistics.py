"""Statistics of a network: its parameters and its arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from torch.func import functional_call

from paceline.models.blocks import Attention, ConvUnit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What one convolution, or the heart of one attention, computes for one image in a forward pass."""

    name: str
    """Key of the module, such as `model.4.cv1.conv`."""
    kind: Literal["convolution", "attention"]
    operations: int
    """Twice the multiply-adds."""
    inputs: int
    """Numbers read of the module's input."""
    outputs: int
    """Numbers written."""
    weights: int
    """Numbers of the module's own weights."""
    normed: bool = False
    """Whether a batch norm follows, and with it an activation or none."""
    takes_images: bool = False
    """Whether its input is the network's, for which nobody needs a gradient."""

    @property
    def node(self) -> int:
        """Number of the graph's node that it belongs to; 0 for what is no node of a graph."""
        _, _, rest = self.name.partition("model.")
        number = rest.partition(".")[0]
        return int(number) if number.isdecimal() else 0


def count_parameters(model: nn.Module) -> int:
    """Count all numbers in parameters, those that are never trained included; buffers are not counted."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gflops(model: nn.Module, imgsz: int = 640) -> float:
    """10^9 operations for one image of `imgsz` x `imgsz` pixels: twice the multiply-adds of all convolutions.

    As for `arithmetic_of`, the model is left alone. Attention is left out, as in the published figures.
    """
    return sum(entry.operations for entry in arithmetic_of(model, imgsz) if entry.kind == "convolution") / 1e9


_IMAGES = 2
"""Of one image of 32 px, the coarsest map has a single value per channel, which batch norms refuse in training."""


def arithmetic_of(model: nn.Module, imgsz: int = 640) -> tuple[Arithmetic, ...]:
    """Everything that multiplies matrices, for one image of `imgsz` x `imgsz` pixels, in the order in which it runs.

    Only shapes are computed, on the meta device; the model's tensors and mode are left alone.
    """
    images = torch.empty(_IMAGES, 3, imgsz, imgsz, device="meta", dtype=next(model.parameters()).dtype)
    units = (unit for unit in model.modules() if isinstance(unit, ConvUnit))
    normed = {unit.conv for unit in units if isinstance(unit.bn, nn.BatchNorm2d)}
    names = {module: name for name, module in model.named_modules()}
    found: list[Arithmetic] = []

    def count_convolution(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        convolution = cast("nn.Conv2d", module)
        fan_in = convolution.in_channels // convolution.groups * math.prod(convolution.kernel_size)
        found.append(
            Arithmetic(
                name=names[module],
                kind="convolution",
                operations=2 * output.numel() * fan_in // _IMAGES,
                inputs=inputs[0].numel() // _IMAGES,
                outputs=output.numel() // _IMAGES,
                weights=convolution.weight.numel(),
                normed=module in normed,
                takes_images=inputs[0] is images,
            )
        )

    def count_attention(module: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        attention = cast("Attention", module)
        cells, heads = inputs[0].shape[2] * inputs[0].shape[3], attention.num_heads
        key, value = heads * attention.key_width, heads * attention.value_width
        found.append(
            Arithmetic(
                name=names[module],
                kind="attention",
                operations=2 * cells * cells * (key + value),
                inputs=cells * (2 * key + value),
                outputs=cells * value,
                weights=0,
            )
        )

    hooks = [module.register_forward_hook(count_convolution) for module in names if isinstance(module, nn.Conv2d)]
    hooks += [module.register_forward_hook(count_attention) for module in names if isinstance(module, Attention)]
    shapes = {name: t.to("meta") for name, t in chain(model.named_parameters(), model.named_buffers())}
    try:
        with torch.no_grad():
            functional_call(model, shapes, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(found)
