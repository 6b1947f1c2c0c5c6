"""Depthwise convolution: 3 x 3 with a filter for each channel as one differentiable operation.

The gradient of the map is computed by `depthwise_kernels`, which takes two thirds of cuDNN's time; all else by torch.
Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paceline.models.operations.beside import beside
from paceline.models.operations.depthwise_kernels import _trace_back
from paceline.triton_kernels import cdiv, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the map."""


@dataclass(frozen=True)
class Launch:
    """How kernels are launched; changes the time only."""

    tile: int
    """Numbers that a program looks at together."""
    columns: int
    """Of the cells of a tile; a power of two."""
    warps: int


LAUNCH = Launch(tile=2048, columns=8, warps=4)


@dataclass(frozen=True)
class _Cut:
    """How a map is cut into tiles."""

    down: int
    across: int
    """Tiles of an image."""
    blocks: int
    """Of channels."""
    tile: dict[str, int]
    """Lines, columns and channels of a tile."""

    @classmethod
    def of(cls, x: Tensor, launch: Launch) -> _Cut:
        _, num_channels, height, width = x.shape
        channels = next(width for width in _WIDTHS if num_channels % width == 0)
        lines = max(launch.tile // channels // launch.columns, 1)
        down, across = cdiv(height, lines), cdiv(width, launch.columns)
        tile = {"lines": lines, "columns": launch.columns, "channels": channels}
        return cls(down, across, num_channels // channels, tile)


def traced_back(of_y: Tensor, filters: Tensor, launch: Launch = LAUNCH) -> Tensor:
    """Return the gradient of the map, of y's type: y' BCHW, channels-last, and filters 9, C, both of one type."""
    images, num_channels, height, width = of_y.shape
    of_x = torch.empty_like(of_y, memory_format=torch.channels_last)
    cut = _Cut.of(of_y, launch)
    start_kernel(
        _trace_back,
        (images * cut.down * cut.across, cut.blocks),
        of_y,
        filters,
        of_x,
        height,
        width,
        cut.down,
        cut.across,
        num_channels,
        **cut.tile,
        num_warps=launch.warps,
    )
    return of_x


class _Convolved(torch.autograd.Function):
    """3 x 3 depthwise convolution with padding 1, stride 1 and without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, joins: bool, launch: Launch) -> Tensor:
        """Return y BCHW, channels-last and of type `dtype`."""
        ctx.types = (x.dtype, weight.dtype)
        x, filters = x.to(dtype).contiguous(memory_format=torch.channels_last), weight.to(dtype)
        ctx.save_for_backward(x, filters)
        ctx.launch, ctx.joins = launch, joins
        return F.conv2d(x, filters, padding=1, groups=len(filters))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, by a kernel, and of the filters, by torch."""
        x, filters = ctx.saved_tensors
        type_of_x, type_of_weight = ctx.types
        of_y = of_y.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:
            sizes = ([1, 1], [1, 1], [1, 1], False, [0, 0], len(filters))
            with beside(of_y, x, filters, joins=ctx.joins):
                _, of_weight, _ = torch.ops.aten.convolution_backward(
                    of_y, x, filters, None, *sizes, [False, True, False]
                )
                of_weight = of_weight.to(type_of_weight)
        if ctx.needs_input_grad[0]:
            of_x = traced_back(of_y, filters.view(-1, 9).T.contiguous(), ctx.launch).to(type_of_x)
        return of_x, of_weight, None, None, None


def convolved(x: Tensor, weight: Tensor, dtype: torch.dtype, *, joins: bool = False, launch: Launch = LAUNCH) -> Tensor:
    """Convolve BCHW by filters C, 1, 3, 3 with padding 1; on the current stream, without waiting.

    x: a number of channels that eight divides. dtype: what is computed with, and the type of y; filters are rounded to
    it. joins: whether the gradient of the filters meets others before anything reads it (`beside.py`). launch: changes
    the time only.
    Returns y BCHW, channels-last.
    """
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        y: Tensor = _Convolved.apply(x, weight, dtype, joins, launch)
    return y
