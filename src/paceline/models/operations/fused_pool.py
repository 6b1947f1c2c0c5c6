"""Fused pool: a map and its max-pools of 5x5, each of the one before, joined along the channels, by `pool_kernels`.

    x -- pool -- pool -- pool        forward: each writes into its piece of the joined map, the first copies x too
    |     |       |       |          backward: each adds the gradient of the piece that it pooled
    +-----+-------+-------+-- joined

Kept for the backward pass is one byte per maximum, and no map. Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.pitch import by_eights
from paceline.models.operations.pool_kernels import _pool, _pool_gradient
from paceline.triton_kernels import cdiv, has_pairs, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the map."""


@dataclass(frozen=True)
class Tile:
    """What a program works on; changes the time only."""

    rows: int
    """Of the map; four more are read. Most are written out one after the other, so many are much to compile."""
    numbers: int
    """Side by side: cells of a row times channels."""
    warps: int

    def cells(self, channels: int) -> int:
        """Return how many cells of a row a tile has."""
        return max(self.numbers // channels, 1)

    def grid(self, shape: torch.Size, channels: int) -> tuple[int, int, int]:
        """Return the numbers of programs: strips of columns of all images, of rows, of channels."""
        images, num_channels, height, width = shape
        strips = cdiv(images * width, self.cells(channels))
        return strips, cdiv(height, self.rows), num_channels // channels


FORWARD = Tile(rows=5, numbers=512, warps=2)
BACKWARD = Tile(rows=4, numbers=512, warps=2)


def _width_of_tiles(num_channels: int) -> int:
    return next(width for width in _WIDTHS if num_channels % width == 0)


class _Pyramid(torch.autograd.Function):
    """A map and its max-pools, joined."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pools: int, tile: Tile, gradient_tile: Tile) -> Tensor:
        """Map B C H W to B (1 + pools)C H W, channels-last."""
        images, num_channels, height, width = x.shape
        before, before_pitch = by_eights(x)
        pitch = (1 + pools) * num_channels
        joined = x.new_empty((images, height, width, pitch)).permute(0, 3, 1, 2)
        pieces = joined.split(num_channels, dim=1)
        places = x.new_empty((pools, images, height, width, num_channels), dtype=torch.uint8)
        channels = _width_of_tiles(num_channels)
        for number in range(pools):
            start_kernel(
                _pool,
                tile.grid(x.shape, channels),
                before,
                pieces[0],
                pieces[number + 1],
                places[number],
                before_pitch,
                pitch,
                images * width,
                height,
                width,
                num_channels,
                copies=number == 0,
                pairs=x.element_size() == 2 and has_pairs(x),
                rows=tile.rows,
                cells=tile.cells(channels),
                channels=channels,
                num_warps=tile.warps,
            )
            before, before_pitch = pieces[number + 1], pitch
        ctx.save_for_backward(places)
        ctx.tile = gradient_tile
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_joined: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the map, rounded to its type after each pool."""
        (places,) = ctx.saved_tensors
        tile = ctx.tile
        _, images, height, width, num_channels = places.shape
        of_joined, pitch = by_eights(of_joined)
        *others, of_pooled = of_joined.split(num_channels, dim=1)
        pooled_pitch = pitch
        channels = _width_of_tiles(num_channels)
        for place, beside in zip(reversed(places.unbind()), reversed(others), strict=True):
            of_x = torch.empty_like(beside, memory_format=torch.channels_last)
            start_kernel(
                _pool_gradient,
                tile.grid(beside.shape, channels),
                of_pooled,
                beside,
                place,
                of_x,
                pooled_pitch,
                pitch,
                images * width,
                height,
                width,
                num_channels,
                rows=tile.rows,
                cells=tile.cells(channels),
                channels=channels,
                num_warps=tile.warps,
            )
            of_pooled, pooled_pitch = of_x, num_channels
        return of_pooled, None, None, None


def pyramid(x: Tensor, pools: int, *, tile: Tile = FORWARD, gradient_tile: Tile = BACKWARD) -> Tensor:
    """Join a map with its max-pools of 5x5, each of the one before; on the current stream, without waiting.

    x: B C H W, float32, bfloat16 or float16, eight divides C. tile, gradient_tile: change the time only.
    Returns B (1 + pools)C H W, channels-last.
    """
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        joined: Tensor = _Pyramid.apply(x, pools, tile, gradient_tile)
    return joined
