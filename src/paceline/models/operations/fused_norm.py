"""Fused norm: batch norm in training and the activation after it as one differentiable operation, by `norm_kernels`.

The result may be asked for in two halves of the channels, maps of their own, for a block that carries one and works on
the other: both are contiguous then, and gradients that come back in parts are read where they lie. So are those of
several uses (`shared.py`): the pass that reads them first writes their sum for the other. Needs Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.handover import Unapplied
from paceline.models.operations.moment_kernels import _join_moments
from paceline.models.operations.moments import Moments
from paceline.models.operations.norm_kernels import (
    _apply,
    _apply_gradient,
    _gradient_sums,
    _settle_statistics,
    _settle_sums,
    _statistics,
)
from paceline.models.operations.pitch import readable
from paceline.models.operations.shared import MOST, Gathering, Left
from paceline.triton_kernels import KEPT_CUTS, cdiv, has_ptx, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True)
class Launch:
    """How kernels are launched; changes the time only."""

    tile: int
    """Numbers that a program looks at together."""
    warps: int
    stages: int = 1
    """Turns of a loop whose loads are under way together; fewer where a turn has more to load."""
    programs: int = 1024
    """That share the rows of a sum, over all channels; eight for each multiprocessor of a large GPU."""


SUMS = Launch(tile=1024, warps=2, stages=5)
RESULTS = Launch(tile=1024, warps=2)
_MOST_STAGES = dict(zip(range(1, MOST + 1), (5, 4, 4, 3), strict=True))
"""By the gradients that a turn loads: with the programs of `SUMS` a multiprocessor has 28 KB for each."""
_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the map. Few, since each is compiled for itself."""
_VECTOR = 8
"""Channels that are loaded at once where their number allows it."""
_MOST_BELOW = 65535
"""Programs in the second direction of a grid."""
_MOST_PARTS = 512
_MOST_PARTS_BEFORE = 1024
"""Of moments that a convolution has written: as many are settled at once, more are joined before."""
_JOINED_PARTS, _JOINED_CHANNELS = 32, 32
"""Of a program that makes one part of many."""
_SETTLED_CHANNELS = 8
"""Of a program that combines the parts."""


@dataclass(frozen=True)
class _Cut:
    """How a matrix is cut into tiles and parts."""

    rows: int
    """Of a tile."""
    channels: int
    """Of a tile, a power of two."""
    blocks: int
    """Tiles side by side, which hold all channels."""
    pieces: int
    """Tiles below each other, which hold all rows."""
    parts: int
    """Programs that share the rows of a sum, all with as many tiles, or one fewer."""

    @classmethod
    @functools.lru_cache(maxsize=KEPT_CUTS)
    def of(cls, num_rows: int, num_channels: int, pieces: int, launch: Launch) -> _Cut:
        fitting = [width for width in _WIDTHS if num_channels // pieces % width == 0]
        assert fitting or pieces == 1, "tiles lie in one piece"
        channels = fitting[0] if fitting else min(next_power_of_2(num_channels), _WIDTHS[0])
        blocks = cdiv(num_channels, channels)
        rows = max(launch.tile // channels, 1)
        wanted = max(min(launch.programs // blocks, _MOST_PARTS), 1)
        pieces = cdiv(num_rows, rows)
        return cls(rows, channels, blocks, pieces, cdiv(pieces, cdiv(pieces, wanted)))

    @property
    def grid(self) -> tuple[int, int, int]:
        """Programs that have a tile each; those of the same rows follow each other."""
        times = cdiv(self.pieces, _MOST_BELOW)
        return self.blocks, cdiv(self.pieces, times), times


def _step(*pitches: int) -> int:
    """Return what all distances between cells are multiples of, as far as loads profit from it."""
    return _VECTOR if all(pitch % _VECTOR == 0 for pitch in pitches) else 1


def moments_of(y: Tensor, launch: Launch = SUMS) -> Moments:
    """Return the moments of a channels-last map, by a pass over it."""
    num_channels = y.shape[1]
    num_rows = y.numel() // num_channels
    cut = _Cut.of(num_rows, num_channels, 1, launch)
    moments = Moments.empty(y, cut.parts, num_channels)
    start_kernel(
        _statistics,
        (cut.blocks, cut.parts),
        y,
        moments.table,
        num_rows,
        num_channels,
        rows=cut.rows,
        channels=cut.channels,
        step=_step(num_channels),
        stages=launch.stages,
        num_warps=launch.warps,
    )
    return moments


def _few(moments: Moments) -> Moments:
    """Return moments in few enough parts to be settled at once, joined if there are more."""
    while moments.num_parts > _MOST_PARTS_BEFORE:
        chunks = cdiv(moments.num_parts, _JOINED_PARTS)
        joined = Moments.empty(moments.table, chunks, moments.num_channels)
        start_kernel(
            _join_moments,
            (chunks, cdiv(moments.num_channels, _JOINED_CHANNELS)),
            moments.table,
            joined.table,
            moments.num_channels,
            moments.num_parts,
            parts=_JOINED_PARTS,
            channels=_JOINED_CHANNELS,
            num_warps=4,
        )
        moments = joined
    return moments


@dataclass(frozen=True)
class _Gradients:
    """Of z, as kernels take them: all of its first piece, then all of its second, as many places for each."""

    maps: tuple[Tensor, ...]
    pitches: tuple[int, ...]
    counts: tuple[int, ...]
    """How many there are of each piece; what follows them is not looked at."""
    room: int
    """Places of a piece."""

    @classmethod
    def of(cls, pieces: Sequence[Sequence[Tensor]]) -> _Gradients:
        counts = tuple(map(len, pieces))
        room = max(counts)
        found = [list(map(readable, maps)) for maps in pieces]
        filled = [place for mine in found for place in (*mine, *mine[:1] * (room - len(mine)))]
        return cls(tuple(values for values, _ in filled), tuple(pitch for _, pitch in filled), counts, room)

    def totals(self) -> _Gradients:
        """Return a place for the sum of each piece, which for a single gradient is where that lies."""
        firsts = zip(self.maps[:: self.room], self.counts, strict=True)
        return _Gradients.of(
            [
                [first if count == 1 else torch.empty_like(first, memory_format=torch.channels_last)]
                for first, count in firsts
            ]
        )


class _NormedAndActivated(Gathering):
    """Batch norm of the batch's own statistics, and SiLU or nothing after it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        carried: Tensor | None,
        latest: tuple[Tensor, Tensor],
        eps: float,
        silu: bool,
        pieces: int,
        moments: Moments | None,
        of_sums: Launch,
        of_results: Launch,
    ) -> tuple[Tensor, ...]:
        """Return z BCHW, channels-last and of y's type, in pieces; `latest` C takes mean and unbiased variance."""
        y = y.contiguous(memory_format=torch.channels_last)
        num_channels = y.shape[1]
        num_rows = y.numel() // num_channels
        cut = _Cut.of(num_rows, num_channels, pieces, of_sums)
        tiles = _Cut.of(num_rows, num_channels, pieces, of_results)
        kept = y.new_empty((2, num_channels), dtype=torch.float32)
        images, _, height, width = y.shape
        z = y.new_empty((pieces, images, height, width, num_channels // pieces))
        ctx.handover = moments.handover if moments and pieces == 1 else None
        room, warps = (_MOST_PARTS, 4) if moments is None else (_MOST_PARTS_BEFORE, 8)
        moments = moments_of(y, of_sums) if moments is None else _few(moments)
        start_kernel(
            _settle_statistics,
            (cdiv(num_channels, _SETTLED_CHANNELS),),
            moments.table,
            kept,
            *latest,
            num_rows,
            num_channels,
            moments.num_parts,
            eps,
            parts_room=room,
            channels=_SETTLED_CHANNELS,
            num_warps=warps,
        )
        added, pitch = (y, num_channels) if carried is None else readable(carried)
        start_kernel(
            _apply,
            tiles.grid,
            y,
            kept,
            weight,
            bias,
            added,
            z,
            num_rows,
            num_channels,
            num_channels // pieces,
            pitch,
            silu=silu,
            adds=carried is not None,
            rows=tiles.rows,
            channels=tiles.channels,
            step=_step(num_channels, pitch),
            ptx=has_ptx(y),
            num_warps=of_results.warps,
        )
        ctx.save_for_backward(y, weight, bias, kept)
        ctx.cut, ctx.tiles, ctx.silu, ctx.pieces, ctx.launches = cut, tiles, silu, pieces, (of_sums, of_results)
        ctx.left = Left(pieces)
        return tuple(piece.permute(0, 3, 1, 2) for piece in z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, weight and bias, and of what was carried.

        That of y is unwritten where the convolution before makes it on the way.
        """
        y, weight, bias, kept = ctx.saved_tensors
        cut, tiles = ctx.cut, ctx.tiles
        of_sums, of_results = ctx.launches
        of_z = _Gradients.of([(one, *others) for one, others in zip(gradients, ctx.left.take(), strict=True)])
        totals = of_z.totals()
        num_channels = y.shape[1]
        num_rows = y.numel() // num_channels
        parts = y.new_empty((2, cut.parts, num_channels), dtype=torch.float32)
        of_affine = y.new_empty((2, num_channels), dtype=torch.float32)
        ways = {"silu": ctx.silu, "pieces": ctx.pieces, "ptx": has_ptx(y)}
        start_kernel(
            _gradient_sums,
            (cut.blocks, cut.parts),
            of_z.maps,
            of_z.pitches,
            totals.maps,
            of_z.counts[0],
            of_z.counts[-1],
            y,
            kept,
            weight,
            bias,
            parts,
            num_rows,
            num_channels,
            rows=cut.rows,
            channels=cut.channels,
            **ways,
            room=of_z.room,
            step=_step(num_channels, *of_z.pitches),
            stages=min(of_sums.stages, _MOST_STAGES[of_z.room]),
            num_warps=of_sums.warps,
        )
        del of_z  # what nobody else needs may be written over from here on
        start_kernel(
            _settle_sums,
            (cdiv(num_channels, _SETTLED_CHANNELS),),
            parts,
            of_affine,
            num_channels,
            cut.parts,
            parts_room=_MOST_PARTS,
            channels=_SETTLED_CHANNELS,
            num_warps=4,
        )
        of_bias, of_weight = of_affine.to(weight.dtype)
        of_carried = totals.maps[0] if ctx.needs_input_grad[3] else None
        if ctx.handover is not None:
            affine = {"weight": weight, "bias": bias, "of_affine": of_affine, "silu": ctx.silu}
            first, pitch = totals.maps[0], totals.pitches[0]
            unapplied = Unapplied(of_z=first, pitch=pitch, y=y.detach(), kept=kept, **affine)
            return ctx.handover.leave(unapplied), of_weight, of_bias, of_carried, *[None] * 7
        of_y = torch.empty_like(y, memory_format=torch.channels_last)
        start_kernel(
            _apply_gradient,
            tiles.grid,
            totals.maps,
            totals.pitches,
            y,
            kept,
            weight,
            bias,
            of_affine,
            of_y,
            num_rows,
            num_channels,
            rows=tiles.rows,
            channels=tiles.channels,
            **ways,
            step=_step(num_channels, *totals.pitches),
            num_warps=of_results.warps,
        )
        return of_y, of_weight, of_bias, of_carried, *[None] * 7


def normed_and_activated(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    latest: tuple[Tensor, Tensor],
    *,
    eps: float,
    silu: bool,
    pieces: int = 1,
    carried: Tensor | None = None,
    moments: Moments | None = None,
    of_sums: Launch = SUMS,
    of_results: Launch = RESULTS,
) -> tuple[Tensor, ...]:
    """Normalise BCHW by its own statistics and activate it; on the current stream, without waiting.

    y: float32, bfloat16 or float16, more than one value per channel. weight, bias: C, float32. latest: C each, float32;
    take the mean and the unbiased variance. silu: whether SiLU follows. pieces: 1, or 2 where eight divides the
    channels of a half. carried: BCHW of y's type, added to z, which is whole then; its gradient is that of z.
    moments: those of y, which saves a pass over it.
    of_sums, of_results: change the time only.
    Returns z, or its halves along the channels, each contiguous, channels-last and of y's type.
    """
    with torch.cuda.device_of(y):  # where Triton launches; a backward pass is in a thread of the device
        z: tuple[Tensor, ...] = _NormedAndActivated.apply(
            y, weight, bias, carried, latest, eps, silu, pieces, moments, of_sums, of_results
        )
    return z
