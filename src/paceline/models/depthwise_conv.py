"""Depthwise convolution: 3 x 3 with a filter for each channel as one differentiable operation, by `depthwise_kernels`.

Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch.autograd.function import once_differentiable

from paceline.models.depthwise_kernels import _convolve_each, _filter_gradient
from paceline.models.narrow_conv import settled

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
    programs: int = 1056
    """That share the cells of a gradient of filters; eight for each multiprocessor of a large GPU."""


CONVOLVING = Launch(tile=2048, columns=8, warps=4)
WEIGHING = Launch(tile=1024, columns=8, warps=4)


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
        down, across = triton.cdiv(height, lines), triton.cdiv(width, launch.columns)
        tile = {"lines": lines, "columns": launch.columns, "channels": channels}
        return cls(down, across, num_channels // channels, tile)


def _convolved(x: Tensor, filters: Tensor, launch: Launch, *, turned: bool = False) -> Tensor:
    """Convolve BCHW, channels-last, with filters 9, C."""
    images, num_channels, height, width = x.shape
    y = torch.empty_like(x, memory_format=torch.channels_last)
    cut = _Cut.of(x, launch)
    _convolve_each[(images * cut.down * cut.across, cut.blocks)](
        x,
        filters,
        y,
        height,
        width,
        cut.down,
        cut.across,
        num_channels,
        turned=turned,
        **cut.tile,
        num_warps=launch.warps,
    )
    return y


def _weighed(x: Tensor, of_y: Tensor, launch: Launch) -> Tensor:
    """Return the gradient of the filters, C, 1, 3, 3, float32."""
    images, num_channels, height, width = x.shape
    cut = _Cut.of(x, launch)
    tiles = images * cut.down * cut.across
    part_tiles = triton.cdiv(tiles, max(launch.programs // cut.blocks, 1))
    parts = x.new_empty((triton.cdiv(tiles, part_tiles), num_channels, 1, 3, 3), dtype=torch.float32)
    _filter_gradient[(len(parts), cut.blocks)](
        x,
        of_y,
        parts,
        height,
        width,
        cut.down,
        cut.across,
        num_channels,
        tiles,
        part_tiles,
        **cut.tile,
        num_warps=launch.warps,
    )
    return settled(parts)


class _Convolved(torch.autograd.Function):
    """3 x 3 depthwise convolution with padding 1, stride 1 and without bias."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype, convolving: Launch, weighing: Launch
    ) -> Tensor:
        """Return y BCHW, channels-last and of type `dtype`."""
        ctx.types = (x.dtype, weight.dtype)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        filters = weight.new_empty((9, len(weight)), dtype=dtype).copy_(weight.view(-1, 9).T)  # rounded on the way
        ctx.save_for_backward(x, filters)
        ctx.launches = (convolving, weighing)
        return _convolved(x, filters, convolving)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the filters."""
        x, filters = ctx.saved_tensors
        type_of_x, type_of_weight = ctx.types
        convolving, weighing = ctx.launches
        of_y = of_y.contiguous(memory_format=torch.channels_last)
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            of_x = _convolved(of_y, filters, convolving, turned=True).to(type_of_x)
        if ctx.needs_input_grad[1]:
            of_weight = _weighed(x, of_y, weighing).to(type_of_weight)
        return of_x, of_weight, None, None, None


def convolved(
    x: Tensor, weight: Tensor, dtype: torch.dtype, *, convolving: Launch = CONVOLVING, weighing: Launch = WEIGHING
) -> Tensor:
    """Convolve BCHW by filters C, 1, 3, 3 with padding 1; on the current stream, without waiting.

    x: a number of channels that eight divides. dtype: what is computed with, and the type of y; filters are rounded to
    it. convolving, weighing: change the time only.
    Returns y BCHW, channels-last.
    """
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        y: Tensor = _Convolved.apply(x, weight, dtype, convolving, weighing)
    return y
