"""Fused ends: the last convolution of a head's branch as one differentiable operation, by `end_kernels`.

Its result is a part of joined points, and so is the gradient that it is given. Needs Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.beside import beside
from paceline.models.operations.end_kernels import _end_parts, _multiply_end
from paceline.models.operations.half_weights import numbers_of, whole_of
from paceline.models.operations.part_kernels import _settle_weight
from paceline.models.operations.pitch import Layout
from paceline.triton_kernels import KEPT_CUTS, cdiv, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 8
_ALIGNED_BYTES = 16
_LEAST_COLUMNS, _MOST_COLUMNS = 16, 128
_FEW_COLUMNS = 64
"""That four warps have room for."""
_LEAST_TURNS = 8
"""Of a program that sums over cells."""
_SETTLED_PARTS, _SETTLED_WEIGHTS = 64, 32


@dataclass(frozen=True)
class Tile:
    """What a program computes, and how; changes the time, and the order of sums."""

    rows: int
    columns: int
    more: int
    """Columns beside these: 80 are 64 and 16."""
    depth: int
    """Products that go into each number of the tile at once."""
    warps: int
    stages: int
    """Turns of the loop over the depth whose loads are under way together."""
    programs: int = 264
    """Into which a sum over all cells is cut: two for each multiprocessor of a large GPU."""


@dataclass(frozen=True)
class Tiles:
    """The tiles of the three passes; None for those that the sizes choose."""

    of_points: Tile | None = None
    of_map: Tile | None = None
    of_weight: Tile | None = None


CHOSEN = Tiles()


@functools.lru_cache(maxsize=KEPT_CUTS)
def tile_of_product(num_found: int, num_summed: int) -> Tile:
    """Choose the tile of a product: cells x columns, each a sum over other ones."""
    depth = min(max(next_power_of_2(num_summed), 16), 64)
    columns, more = widths_of(num_found, turns=cdiv(num_summed, depth))
    return Tile(
        rows=128,
        columns=columns,
        more=more,
        depth=depth,
        warps=8 if columns + more > _FEW_COLUMNS else 4,
        stages=min(cdiv(num_summed, depth), 3),
    )


def widths_of(num_columns: int, *, turns: int) -> tuple[int, int]:
    """Return two powers of two, or one and none, which hold so many columns, or a block of many.

    turns: of the loop over the depth. With one there is one width: without a loop, the assembler that comes with Triton
    3.6 (ptxas 12.8) makes the address of the second width's weights from a register that nothing was written to, for 80
    columns and for 96. The second is 16 alone: others have not run in a loop.
    """
    if num_columns > _MOST_COLUMNS + _LEAST_COLUMNS:
        return _MOST_COLUMNS, 0
    room = max(next_power_of_2(num_columns), _LEAST_COLUMNS)
    if turns == 1:
        return min(room, _MOST_COLUMNS), 0
    more = max(next_power_of_2(max(num_columns - room // 2, 1)), _LEAST_COLUMNS)
    return (room // 2, more) if more == _LEAST_COLUMNS < room // 2 else (room, 0)


@functools.lru_cache(maxsize=KEPT_CUTS)
def tile_of_weight(num_out: int, num_in: int) -> Tile:
    """Choose the tile of the weights' gradient: output channels x input channels, each a sum over cells."""
    rows = 64 if num_out <= 64 else 128
    columns = 64 if num_in <= 64 else 128
    return Tile(rows=rows, columns=columns, more=0, depth=64, warps=8 if rows == columns == 128 else 4, stages=3)


def _cells_of(values: Tensor) -> Tensor:
    """Return BCHW as B, cells, C, where eight channels can be loaded at once; copied where it is not so."""
    return values.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).flatten(1, 2)


def _step_of(points: Tensor) -> int:
    """Return how many numbers of B, cells, N may be loaded at once."""
    return _STEP if points.shape[2] % _STEP == 0 else 1


def _readable(points: Tensor) -> Tensor:
    """Return B, cells, N, or a copy where fewer numbers than may be can be loaded at once, as they can of parts."""
    step = _step_of(points)
    lies_well = points.stride(2) == 1 and points.stride(0) % step == points.stride(1) % step == 0
    if lies_well and (step == 1 or points.data_ptr() % _ALIGNED_BYTES == 0):
        return points
    return points.clone(memory_format=torch.contiguous_format)


def multiply(
    given: Tensor, factors: Tensor, bias: Tensor | None, found: Tensor, *, turned: bool, tile: Tile | None = None
) -> None:
    """Write what `given` B, cells, D is by factors C D, or D C if they are turned, and a bias, into B, cells, C."""
    images, cells, num_found = found.shape
    num_summed = given.shape[2]
    tile = tile or tile_of_product(num_found, num_summed)
    num_rows = images * cells
    start_kernel(
        _multiply_end,
        (cdiv(num_rows, tile.rows) * cdiv(num_found, tile.columns + tile.more),),
        given,
        given.stride(0),
        given.stride(1),
        factors,
        factors if bias is None else bias,
        found,
        found.stride(0),
        found.stride(1),
        num_rows,
        cells,
        num_summed=num_summed,
        num_found=num_found,
        given_step=_step_of(given),
        found_step=_step_of(found),
        turned=turned,
        adds=bias is not None,
        rows=tile.rows,
        columns=tile.columns,
        more=tile.more,
        depth=tile.depth,
        stages=tile.stages,
        num_warps=tile.warps,
    )


def sums_of_products(of_y: Tensor, x: Tensor, dtype: torch.dtype, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradients N K and N of weight and bias, by parts of the cells that are added in one order.

    of_y: B, cells, N. x: B, cells, K.
    """
    images, cells, num_out = of_y.shape
    num_in, num_rows = x.shape[2], images * cells
    tile = tile or tile_of_weight(num_out, num_in)
    blocks = cdiv(num_out, tile.rows) * cdiv(num_in, tile.columns)
    wanted = max(min(tile.programs // blocks, num_rows // (tile.depth * _LEAST_TURNS)), 1)
    pieces = cdiv(num_rows, tile.depth)
    num_parts = cdiv(pieces, cdiv(pieces, wanted))
    num_weights = num_out * num_in
    parts = of_y.new_empty((num_parts, num_weights + num_out), dtype=torch.float32)
    start_kernel(
        _end_parts,
        (num_parts * blocks,),
        of_y,
        of_y.stride(0),
        of_y.stride(1),
        x,
        x.stride(0),
        x.stride(1),
        parts,
        num_rows,
        cells,
        num_in=num_in,
        num_out=num_out,
        step=_step_of(of_y),
        rows=tile.rows,
        columns=tile.columns,
        depth=tile.depth,
        stages=tile.stages,
        num_warps=tile.warps,
    )
    found = of_y.new_empty((num_weights + num_out,), dtype=dtype)
    start_kernel(
        _settle_weight,
        (cdiv(len(found), _SETTLED_WEIGHTS),),
        parts,
        found,
        len(found),
        num_parts,
        at_once=_SETTLED_PARTS,
        weights=_SETTLED_WEIGHTS,
        num_warps=4,
    )
    return found[:num_weights].view(num_out, num_in), found[num_weights:]


class _Ended(torch.autograd.Function):
    """A 1 x 1 convolution with bias of a level, written into joined points."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        factors: Tensor,
        addends: Tensor,
        room: tuple[Tensor, int],
        joins: bool,
        tiles: Tiles,
    ) -> Tensor:
        """Write into the joined points B A N of the room, from the place on that it names; return what was written.

        factors, addends: the numbers of weight and bias.
        """
        joined, first = room
        ctx.size = x.shape
        cells = _cells_of(x)
        points = joined[:, first : first + cells.shape[1]]
        ctx.save_for_backward(cells, factors)
        ctx.layout, ctx.type_of_bias, ctx.joins, ctx.tiles = Layout.of(weight), bias.dtype, joins, tiles
        multiply(cells, factors, addends, points, turned=False, tile=tiles.of_points)
        return points

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_points: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, first, since it is what others wait for, and of weight and bias."""
        cells, factors = ctx.saved_tensors
        of_points = _readable(of_points)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            images, channels, height, width = ctx.size
            found = torch.empty_like(cells, memory_format=torch.contiguous_format)
            multiply(of_points, factors, None, found, turned=True, tile=ctx.tiles.of_map)
            of_x = found.view(images, height, width, channels).permute(0, 3, 1, 2)
        if any(ctx.needs_input_grad[1:3]):
            with beside(of_points, cells, joins=ctx.joins):
                sums = sums_of_products(of_points, cells, ctx.layout.dtype, ctx.tiles.of_weight)
                of_weight, of_bias = sums[0].as_strided(ctx.layout.shape, ctx.layout.strides), sums[1]
                of_bias = of_bias.to(ctx.type_of_bias)
        wanted = zip((of_x, of_weight, of_bias), ctx.needs_input_grad, strict=False)
        return *(value if needs else None for value, needs in wanted), *[None] * 5


def ended(x: Tensor, weight: Tensor, bias: Tensor, joined: Tensor, first: int, *, tiles: Tiles = CHOSEN) -> Tensor:
    """Convolve BKHW by a weight N K 1 1 and a bias N into joined points; on the current stream, without waiting.

    joined: B A N, bfloat16 or float16, in which all is computed: x and the weight are rounded to it, the bias is not.
    first: which of the A points is the first of x. K is a multiple of eight. Returns B (H W) N, a part of `joined`.
    Gradients are of the types of what was given, those of weight and bias sums in float32.
    """
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        factors = numbers_of(weight, joined.dtype).flatten(1)
        learns = [whole_of(weight), whole_of(bias)]
        joins = all(taken is not own for taken, own in zip(learns, (weight, bias), strict=True) if own.requires_grad)
        points: Tensor = _Ended.apply(
            x.to(joined.dtype), *learns, factors, bias.detach(), (joined.detach(), first), joins, tiles
        )
    return points
