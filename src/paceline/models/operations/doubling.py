"""Doubling: nearest-neighbour upsampling by two as one differentiable operation, by Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.doubling_kernels import _double, _halve
from paceline.models.operations.pitch import by_eights
from paceline.triton_kernels import cdiv, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the map."""


@dataclass(frozen=True)
class Tile:
    """What a program works on; changes the time only."""

    numbers: int
    """Cells of the small map times channels."""
    warps: int


FORWARD = Tile(numbers=1024, warps=4)
BACKWARD = Tile(numbers=1024, warps=4)


def _cut(num_cells: int, num_channels: int, tile: Tile) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the numbers of programs along cells and channels, and how each is compiled."""
    channels = next(width for width in _WIDTHS if num_channels % width == 0)
    cells = max(tile.numbers // channels, 1)
    grid = (cdiv(num_cells, cells), num_channels // channels)
    return grid, {"cells": cells, "channels": channels, "num_warps": tile.warps}


class _Doubled(torch.autograd.Function):
    """Each cell four times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tile: Tile, gradient_tile: Tile) -> Tensor:
        """Map B C H W to B C 2H 2W, channels-last."""
        ctx.tile = gradient_tile
        images, num_channels, height, width = x.shape
        num_cells = images * height * width
        x, pitch = by_eights(x)
        doubled = x.new_empty((images, 2 * height, 2 * width, num_channels)).permute(0, 3, 1, 2)
        grid, sizes = _cut(num_cells, num_channels, tile)
        start_kernel(_double, grid, x, doubled, num_cells, width, num_channels, pitch, **sizes)
        return doubled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_doubled: Tensor) -> tuple[Tensor | None, ...]:
        """Sum of the gradients of the four cells, rounded once."""
        images, num_channels, height, width = of_doubled.shape
        height, width = height // 2, width // 2
        num_cells = images * height * width
        of_doubled, pitch = by_eights(of_doubled)
        of_x = of_doubled.new_empty((images, height, width, num_channels)).permute(0, 3, 1, 2)
        grid, sizes = _cut(num_cells, num_channels, ctx.tile)
        start_kernel(_halve, grid, of_doubled, of_x, num_cells, width, num_channels, pitch, **sizes)
        return of_x, None, None


def doubled_map(x: Tensor, *, tile: Tile = FORWARD, gradient_tile: Tile = BACKWARD) -> Tensor:
    """Write each cell four times; on the current stream, without waiting.

    x: B C H W, float32, bfloat16 or float16, eight divides C. tile, gradient_tile: change the time only.
    Returns B C 2H 2W, channels-last.
    """
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        doubled: Tensor = _Doubled.apply(x, tile, gradient_tile)
    return doubled
