"""Fused bias: a convolution with bias whose bias gradient is summed by `bias_kernels`, on the way to the other two.

PyTorch would copy a gradient that does not lie evenly, and read the copy for the sum. Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.bias_kernels import _settle, _sums
from paceline.models.operations.parted_conv import gradients_apart
from paceline.triton_kernels import autocast_type, cdiv, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the gradient; else as many as there are."""
_WIDEST = 256
_VECTOR = 8
"""Channels that are loaded at once where all distances allow it."""
_MOST_PARTS = 512
_SETTLED_CHANNELS = 8
"""Of a program that adds up the parts."""


@dataclass(frozen=True)
class Launch:
    """How the sums are cut; changes the time, and the order in which numbers are added."""

    tile: int = 2048
    """Numbers that a program looks at together."""
    programs: int = 1024
    """That share the cells, over all channels."""
    warps: int = 4
    whole: bool = False
    """Whether a program looks at all channels at once, where these are no power of two with idle lanes."""

    def channels(self, num_channels: int) -> int:
        """Return how many channels a tile has."""
        fitting = [count for count in _WIDTHS if num_channels % count == 0]
        if fitting and not self.whole:
            return fitting[0]
        return min(next_power_of_2(num_channels), _WIDEST if self.whole else _WIDTHS[0])


LAUNCH = Launch()


def pitches_of(gradient: Tensor) -> tuple[int, int] | None:
    """Return how far apart images lie, and the cells of one; None if these lie unevenly."""
    _, channels, height, width = gradient.shape
    batch_stride, channel_stride, row_stride, cell_stride = gradient.stride()
    if width == 1:
        cell_stride = row_stride
    if (height > 1 and row_stride != width * cell_stride) or (channel_stride != 1 and channels > 1):
        return None
    return batch_stride, cell_stride


def sums_over_cells(gradient: Tensor, *, launch: Launch = LAUNCH) -> tuple[Tensor, Tensor]:
    """Sum B C H W over all but the channels; on the current stream, without waiting.

    gradient: float32, bfloat16 or float16, in any memory layout; read once where the cells of each image lie evenly.
    Returns the sums C, float32, and the gradient as channels-last map: itself if it is one, else a copy.
    """
    images, num_channels, height, width = gradient.shape
    pitches = pitches_of(gradient)
    if pitches is None:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        pitches = (height * width * num_channels, num_channels)
    image_pitch, pitch = pitches
    copies = not gradient.is_contiguous(memory_format=torch.channels_last)
    compact = torch.empty_like(gradient, memory_format=torch.channels_last) if copies else gradient
    channels = launch.channels(num_channels)
    blocks = cdiv(num_channels, channels)
    cells = max(launch.tile // channels, 1)
    num_cells = images * height * width
    wanted = max(min(launch.programs // blocks, _MOST_PARTS), 1)
    part_cells = cdiv(cdiv(num_cells, wanted), cells) * cells
    num_parts = cdiv(num_cells, part_cells)
    parts = gradient.new_empty((num_parts, num_channels), dtype=torch.float32)
    sums = gradient.new_empty((num_channels,), dtype=torch.float32)
    start_kernel(
        _sums,
        (num_parts, blocks),
        gradient,
        compact,
        parts,
        num_cells,
        height * width,
        num_channels,
        image_pitch,
        pitch,
        part_cells,
        copies=copies,
        fits=num_channels % channels == 0,
        cells=cells,
        channels=channels,
        step=_VECTOR if all(apart % _VECTOR == 0 for apart in (num_channels, image_pitch, pitch)) else 1,
        num_warps=launch.warps,
    )
    start_kernel(
        _settle,
        (cdiv(num_channels, _SETTLED_CHANNELS),),
        parts,
        sums,
        num_channels,
        num_parts,
        parts_room=_MOST_PARTS,
        channels=_SETTLED_CHANNELS,
        num_warps=4,
    )
    return sums, compact


class _Biased(torch.autograd.Function):
    """A convolution with bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        joins: bool,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        """Convolve BCHW; x and weight are of one type, which the result has."""
        ctx.save_for_backward(x, weight)
        ctx.settings = (stride, padding, dilation, False, (0, 0), groups)
        ctx.bias_type, ctx.joins = bias.dtype, joins
        convolved: Tensor = torch.ops.aten.convolution(x, weight, bias.to(x.dtype), *ctx.settings)
        return convolved

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias; that of the bias is a sum in float32."""
        x, weight = ctx.saved_tensors
        of_bias = None
        if ctx.needs_input_grad[2]:
            sums, gradient = sums_over_cells(gradient)
            of_bias = sums.to(ctx.bias_type)
        of_x, of_weight = gradients_apart(gradient, x, weight, ctx.settings, ctx.needs_input_grad[:2], joins=ctx.joins)
        return of_x, of_weight, of_bias, *[None] * 5


def biased_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    joins: bool = False,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Convolve BCHW as `F.conv2d` does, in autocast in its type; on the current stream, without waiting.

    x: channels-last. joins: whether the gradient of the weight meets others before anything reads it (`beside.py`).
    Gradients are of the types of what was given.
    """
    dtype = autocast_type(x)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        convolved: Tensor = _Biased.apply(x, weight, bias, joins, stride, padding, dilation, groups)
    return convolved
