"""Fused joint: a 1 x 1 convolution over several maps as one differentiable operation, by `joint_kernels`.

The maps are not joined, and each gets its gradient as a map of its own, so nothing before them works on slices of a
wider one. Needs Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.beside import beside
from paceline.models.operations.half_weights import numbers_of, whole_of
from paceline.models.operations.joint_kernels import _convolve_joint, _piece_gradients, _weight_parts
from paceline.models.operations.moments import Moments
from paceline.models.operations.part_kernels import _settle_weight
from paceline.models.operations.pitch import Layout, pitch_of
from paceline.triton_kernels import KEPT_CUTS, cdiv, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.operations.moments import Tally


@dataclass(frozen=True)
class Tile:
    """What a program computes, and how; changes the time, and the order of sums."""

    rows: int
    columns: int
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

    of_result: Tile | None = None
    of_pieces: Tile | None = None
    of_weight: Tile | None = None


CHOSEN = Tiles()
_ROOMS = (1, 4, 8)
"""Maps that a kernel has room for: few, since each number is compiled for itself."""
_ALIGNED_BYTES = 16
_STEP = 8
_LEAST_TURNS = 8
"""Of a program that sums over cells."""
_SETTLED_PARTS, _SETTLED_WEIGHTS = 64, 32


@functools.lru_cache(maxsize=KEPT_CUTS)
def tile_of_map(num_channels: int, num_summed: int) -> Tile:
    """Choose the tile of a map that is computed: cells x its channels, each a sum over other channels."""
    if num_channels <= 128:
        columns = max(next_power_of_2(num_channels), 32)
    else:  # as few columns in vain as possible
        columns = 64 if 0 < num_channels % 128 <= 64 else 128
    depth = min(max(next_power_of_2(num_summed), 16), 64)
    return Tile(
        rows=128,
        columns=columns,
        depth=depth,
        warps=8 if columns == 128 else 4,
        stages=2 if num_summed <= depth else 3,
    )


@functools.lru_cache(maxsize=KEPT_CUTS)
def tile_of_weight(num_out: int, num_in: int) -> Tile:
    """Choose the tile of the weights' gradient: output channels x input channels, each a sum over cells."""
    if num_out * num_in <= 128 * 192:
        return Tile(rows=64, columns=64, depth=128, warps=4, stages=3)
    if 128 < num_in <= 256 or num_in % 256 == 0:
        return Tile(rows=128, columns=256, depth=64, warps=8, stages=3, programs=132)  # one has room at a time
    return Tile(rows=128, columns=128, depth=64, warps=8, stages=3)


@dataclass(frozen=True)
class _Pieces:
    """Maps side by side, as kernels take them."""

    maps: tuple[Tensor, ...]
    pitches: tuple[int, ...]
    """How far apart the cells of each lie."""
    ends: tuple[int, ...]
    """Channels up to the end of each."""

    @classmethod
    def of(cls, maps: Sequence[Tensor]) -> _Pieces:
        found = [pitch_of(piece) for piece in maps]
        ends = [sum(piece.shape[1] for piece in maps[: number + 1]) for number in range(len(maps))]
        room = next(room for room in _ROOMS if room >= len(maps))
        more = room - len(maps)  # that begin where no channel is
        pitches = [pitch for pitch in found if pitch is not None]
        assert len(pitches) == len(maps), "cells lie evenly"
        return cls((*maps, *[maps[0]] * more), (*pitches, *[pitches[0]] * more), (*ends, *[ends[-1]] * more))

    @property
    def arguments(self) -> tuple[tuple[Any, ...], ...]:
        """The first three arguments of kernels that work on pieces."""
        return self.maps, self.pitches, self.ends


def _readable(values: Tensor) -> Tensor:
    """Return a map whose cells lie evenly and begin where eight channels can be loaded at once, or a copy that does."""
    pitch = pitch_of(values)
    if pitch is not None and pitch % _STEP == 0 and values.data_ptr() % _ALIGNED_BYTES == 0:
        return values
    return torch.empty_like(values, memory_format=torch.channels_last).copy_(values)


def _few(pieces: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return at most as many maps as kernels have room for, the first ones joined if there are more."""
    more = len(pieces) - _ROOMS[-1]
    return (torch.cat(tuple(pieces[: more + 1]), dim=1), *pieces[more + 1 :]) if more > 0 else tuple(pieces)


def product(factors: Tensor, maps: Sequence[Tensor], tile: Tile | None = None, *, tally: Tally | None = None) -> Tensor:
    """Return y BNHW, channels-last: `maps` BCHW, whose cells lie evenly, by `factors` N K, all of one type.

    tally: takes the moments of y.
    """
    pieces = _Pieces.of(maps)
    num_out, num_in = factors.shape
    images, _, height, width = maps[0].shape
    y = maps[0].new_empty((images, height, width, num_out))
    num_rows = images * height * width
    tile = tile or tile_of_map(num_out, num_in)
    moments = Moments.empty(y, cdiv(num_rows, tile.rows), num_out) if tally else None
    start_kernel(
        _convolve_joint,
        (cdiv(num_rows, tile.rows) * cdiv(num_out, tile.columns),),
        *pieces.arguments,
        factors,
        y,
        moments.table if moments else y,
        num_rows,
        num_in,
        num_out,
        notes=moments is not None,
        room=len(pieces.maps),
        **_constants(tile),
    )
    if tally:
        tally.moments = moments
    return y.permute(0, 3, 1, 2)


def gradients_of_maps(
    factors: Tensor, of_y: Tensor, maps: Sequence[Tensor], tile: Tile | None = None
) -> tuple[Tensor, ...]:
    """Return the gradient of each map, contiguous and channels-last, by one kernel; of the maps only sizes count."""
    found = tuple(torch.empty_like(piece, memory_format=torch.channels_last) for piece in maps)
    pieces = _Pieces.of(found)
    num_out, num_in = factors.shape
    num_rows = of_y.numel() // num_out
    tile = tile or tile_of_map(num_in, num_out)
    start_kernel(
        _piece_gradients,
        (cdiv(num_rows, tile.rows) * cdiv(num_in, tile.columns),),
        of_y,
        pitch_of(of_y),
        factors,
        *pieces.arguments,
        num_rows,
        num_in,
        num_out,
        room=len(pieces.maps),
        **_constants(tile),
    )
    return found


def gradient_of_weight(layout: Layout, of_y: Tensor, maps: Sequence[Tensor], tile: Tile | None = None) -> Tensor:
    """Return the gradient of a weight N K 1 1, laid out like it, by parts of the cells that are added in one order."""
    joined = _Pieces.of(maps)
    num_out, num_in = layout.shape[:2]
    num_rows = of_y.numel() // num_out
    tile = tile or tile_of_weight(num_out, num_in)
    blocks = cdiv(num_out, tile.rows) * cdiv(num_in, tile.columns)
    wanted = max(min(tile.programs // blocks, num_rows // (tile.depth * _LEAST_TURNS)), 1)
    pieces = cdiv(num_rows, tile.depth)
    num_parts = cdiv(pieces, cdiv(pieces, wanted))
    parts = of_y.new_empty((num_parts, num_out, num_in), dtype=torch.float32)
    start_kernel(
        _weight_parts,
        (num_parts * blocks,),
        of_y,
        pitch_of(of_y),
        *joined.arguments,
        parts,
        num_rows,
        num_in,
        num_out,
        room=len(joined.maps),
        **_constants(tile),
    )
    found = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=of_y.device)
    num_weights = num_out * num_in
    start_kernel(
        _settle_weight,
        (cdiv(num_weights, _SETTLED_WEIGHTS),),
        parts,
        found,
        num_weights,
        num_parts,
        at_once=_SETTLED_PARTS,
        weights=_SETTLED_WEIGHTS,
        num_warps=4,
    )
    return found


def _constants(tile: Tile) -> dict[str, int]:
    return {
        "rows": tile.rows,
        "columns": tile.columns,
        "depth": tile.depth,
        "stages": tile.stages,
        "num_warps": tile.warps,
    }


class _Convolved(torch.autograd.Function):
    """A 1 x 1 convolution over maps that stay where they are."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, factors: Tensor, tiles: Tiles, tally: Tally | None, joins: bool, *maps: Tensor
    ) -> Tensor:
        """Return y BCHW, channels-last and of the maps' type, as are `factors` N K, the weight's numbers."""
        maps = tuple(map(_readable, maps))
        ctx.save_for_backward(factors, *maps)
        ctx.layout, ctx.tiles, ctx.joins = Layout.of(weight), tiles, joins
        return product(factors, maps, tiles.of_result, tally=tally)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the weight and of each map."""
        factors, *maps = ctx.saved_tensors
        of_y = _readable(of_y)
        of_weight = of_maps = None
        if ctx.needs_input_grad[0]:
            with beside(of_y, *maps, joins=ctx.joins):
                of_weight = gradient_of_weight(ctx.layout, of_y, maps, ctx.tiles.of_weight)
        needed = ctx.needs_input_grad[5:]
        if any(needed):
            of_maps = gradients_of_maps(factors, of_y, maps, ctx.tiles.of_pieces)
        found = of_maps or (None,) * len(maps)
        return of_weight, *[None] * 4, *(value if needs else None for value, needs in zip(found, needed, strict=True))


def convolved(
    weight: Tensor,
    pieces: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    tally: Tally | None = None,
    tiles: Tiles = CHOSEN,
) -> Tensor:
    """Convolve maps as if they were joined along their channels; on the current stream, without waiting.

    weight: N K 1 1 of any floating type, in this order in memory. pieces: BCHW each, of one B, H and W, and of K
    channels together, in multiples of eight. dtype: bfloat16 or float16, to which all of them are rounded if they are
    not of it. tally: takes the moments of what is returned. tiles: sizes that change the time, and the order of sums.
    Returns BNHW, channels-last and of that type. The weight's gradient is of its own type, a sum in float32.
    """
    with torch.cuda.device_of(pieces[0]):  # where Triton launches; a backward pass is in a thread of the device
        maps = [piece.to(dtype) for piece in _few(pieces)]
        factors, learns = numbers_of(weight, dtype).flatten(1), whole_of(weight)
        y: Tensor = _Convolved.apply(learns, factors, tiles, tally, learns is not weight, *maps)
    return y
