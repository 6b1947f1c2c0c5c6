"""Norm kernels: batch norm in training with the activation after it, forward and backward, by Triton.

A channels-last map is a matrix of N = batch x height x width rows and C channels. What a kernel cannot do without is
one pass for the sums over the rows and one for the result, in both directions:

```
forward    statistics   y -> mean, sum of squares around it, of each part of the rows     reads y
           settle       parts -> mean, variance, 1 / deviation                            small
           apply        y -> z = silu(weight (y - mean) / deviation + bias)               reads y, writes z
backward   sums         z' y -> sum of n', sum of n' standard(y), of each part            reads z', y
           settle       parts -> gradients of bias and weight                             small
           apply        z' y -> y'                                                        reads z', y, writes y'
```
The result may be asked for in two halves of the channels, maps of their own, for a block that carries one and works on
the other: both are contiguous then, and gradients that come back in parts are read where they lie.
What lies between norm and activation is never written: its gradient n' is computed anew from z' and y in both passes.
Sums are float32, around a first value of the part, and parts are joined by counts and means of
each; nothing depends on the order in which programs run. This module needs Triton; nothing imports it before that is
known to work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

_TILE = 2048
"""Numbers that a program looks at together."""
_WIDTHS = (64, 32, 16, 8)
"""Channels of a tile: the first that divides those of the map. Few, since each is compiled for itself."""
_VECTOR = 8
"""Channels that are loaded at once where their number allows it."""
_PROGRAMS = 1024
"""That share the rows of a sum, over all channels; eight for each multiprocessor of a large GPU."""
_MOST_PARTS = 512
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
    parts: int
    """Into which the rows of a sum are cut."""
    part_rows: int
    """Rows of a part; the last may have fewer."""

    @classmethod
    def of(cls, num_rows: int, num_channels: int, pieces: int, tile: int) -> _Cut:
        fitting = [width for width in _WIDTHS if num_channels // pieces % width == 0]
        assert fitting or pieces == 1, "tiles lie in one piece"
        channels = fitting[0] if fitting else min(triton.next_power_of_2(num_channels), _WIDTHS[0])
        blocks = triton.cdiv(num_channels, channels)
        rows = max(tile // channels, 1)
        wanted = max(min(_PROGRAMS // blocks, _MOST_PARTS), 1)
        part_rows = triton.cdiv(triton.cdiv(num_rows, wanted), rows) * rows
        return cls(rows, channels, blocks, triton.cdiv(num_rows, part_rows), part_rows)


def pitch_of(values: Tensor) -> int | None:
    """Return how far apart the cells of a BCHW map lie, C or more where it is part of a wider one; None if unevenly."""
    _, channels, height, width = values.shape
    batch_stride, channel_stride, row_stride, cell_stride = values.stride()
    if width == 1:
        cell_stride = row_stride if height > 1 else batch_stride
    if height == 1:
        row_stride = width * cell_stride
    if len(values) == 1:
        batch_stride = height * row_stride
    even = row_stride == width * cell_stride and batch_stride == height * row_stride
    return cell_stride if even and (channel_stride == 1 or channels == 1) and cell_stride >= channels else None


def _step(*pitches: int) -> int:
    """Return what all distances between cells are multiples of, as far as loads profit from it."""
    return _VECTOR if all(pitch % _VECTOR == 0 for pitch in pitches) else 1


def _readable(values: Tensor) -> tuple[Tensor, int]:
    """Return a map, or a copy where its cells lie unevenly, and how far apart they lie."""
    pitch = pitch_of(values)
    if pitch is not None:
        return values, pitch
    return values.contiguous(memory_format=torch.channels_last), values.shape[1]


class _NormedAndActivated(torch.autograd.Function):
    """Batch norm of the batch's own statistics, and SiLU or nothing after it."""

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        latest: tuple[Tensor, Tensor],
        eps: float,
        silu: bool,
        pieces: int,
        tile: int,
    ) -> tuple[Tensor, ...]:
        """Return z BCHW, channels-last and of y's type, in pieces; `latest` C takes mean and unbiased variance."""
        y = y.contiguous(memory_format=torch.channels_last)
        num_channels = y.shape[1]
        num_rows = y.numel() // num_channels
        cut = _Cut.of(num_rows, num_channels, pieces, tile)
        parts = y.new_empty((2, cut.parts, num_channels), dtype=torch.float32)
        kept = y.new_empty((2, num_channels), dtype=torch.float32)
        images, _, height, width = y.shape
        z = y.new_empty((pieces, images, height, width, num_channels // pieces))
        sizes = {"rows": cut.rows, "channels": cut.channels, "step": _step(num_channels)}
        _statistics[(cut.parts, cut.blocks)](y, parts, num_rows, num_channels, cut.part_rows, **sizes, num_warps=4)
        _settle_statistics[(triton.cdiv(num_channels, _SETTLED_CHANNELS),)](
            parts,
            kept,
            *latest,
            num_rows,
            num_channels,
            cut.parts,
            cut.part_rows,
            eps,
            parts_room=_MOST_PARTS,
            channels=_SETTLED_CHANNELS,
            num_warps=4,
        )
        _apply[(triton.cdiv(num_rows, cut.rows), cut.blocks)](
            y, kept, weight, bias, z, num_rows, num_channels, num_channels // pieces, silu=silu, **sizes, num_warps=4
        )
        ctx.save_for_backward(y, weight, bias, kept)
        ctx.cut, ctx.silu, ctx.pieces = cut, silu, pieces
        return tuple(piece.permute(0, 3, 1, 2) for piece in z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of y, weight and bias."""
        y, weight, bias, kept = ctx.saved_tensors
        cut = ctx.cut
        (first, first_pitch), *others = map(_readable, gradients)
        second, second_pitch = others[0] if others else (first, first_pitch)
        of_z = (first, second, first_pitch, second_pitch)
        num_channels = y.shape[1]
        num_rows = y.numel() // num_channels
        parts = y.new_empty((2, cut.parts, num_channels), dtype=torch.float32)
        of_affine = y.new_empty((2, num_channels), dtype=torch.float32)
        of_y = torch.empty_like(y, memory_format=torch.channels_last)
        sizes = {"rows": cut.rows, "channels": cut.channels, "silu": ctx.silu, "pieces": ctx.pieces}
        sizes["step"] = _step(num_channels, first_pitch, second_pitch)
        _gradient_sums[(cut.parts, cut.blocks)](
            *of_z,
            y,
            kept,
            weight,
            bias,
            parts,
            num_rows,
            num_channels,
            cut.part_rows,
            **sizes,
            num_warps=4,
        )
        _settle_sums[(triton.cdiv(num_channels, _SETTLED_CHANNELS),)](
            parts,
            of_affine,
            num_channels,
            cut.parts,
            parts_room=_MOST_PARTS,
            channels=_SETTLED_CHANNELS,
            num_warps=4,
        )
        _apply_gradient[(triton.cdiv(num_rows, cut.rows), cut.blocks)](
            *of_z,
            y,
            kept,
            weight,
            bias,
            of_affine,
            of_y,
            num_rows,
            num_channels,
            **sizes,
            num_warps=4,
        )
        of_bias, of_weight = of_affine.to(weight.dtype)
        return of_y, of_weight, of_bias, None, None, None, None, None


def normed_and_activated(
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    latest: tuple[Tensor, Tensor],
    *,
    eps: float,
    silu: bool,
    pieces: int = 1,
    tile: int = _TILE,
) -> tuple[Tensor, ...]:
    """Normalise BCHW by its own statistics and activate it; on the current stream, without waiting.

    y: float32, bfloat16 or float16, more than one value per channel. weight, bias: C, float32. latest: C each, float32;
    take the mean and the unbiased variance. silu: whether SiLU follows. pieces: 1, or 2 where eight divides the
    channels of a half. tile: changes the time only.
    Returns z, or its halves along the channels, each contiguous, channels-last and of y's type.
    """
    with torch.cuda.device_of(y):  # where Triton launches; a backward pass is in a thread of the device
        z: tuple[Tensor, ...] = _NormedAndActivated.apply(y, weight, bias, latest, eps, silu, pieces, tile)
    return z


@triton.jit
def _places(row, column, pitch, step: tl.constexpr):
    """Where the channels of rows lie; the compiler is told that rows begin at multiples of `step`."""
    return row.to(tl.int64)[:, None] * (pitch // step * step) + column[None, :]


@triton.jit
def _inside(is_row, is_channel, step: tl.constexpr):
    """Which numbers of a tile there are; tiles are as wide as divides the channels where `step` is not 1."""
    if step == 1:
        return is_row[:, None] & is_channel[None, :]
    return is_row[:, None] & tl.full(is_channel.shape, 1, tl.int1)[None, :]


@triton.jit
def _statistics(
    y, parts, num_rows, num_channels, part_rows, rows: tl.constexpr, channels: tl.constexpr, step: tl.constexpr
):
    """Mean, and sum of squares around it, of the rows of each part."""
    part = tl.program_id(0)
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, num_rows)
    column = tl.program_id(1) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    around = tl.load(y + first.to(tl.int64) * num_channels + column, mask=is_channel, other=0).to(tl.float32)
    total = tl.full((rows, channels), 0.0, tl.float32)
    squares = tl.full((rows, channels), 0.0, tl.float32)
    for start in range(first, last, rows):
        row = start + tl.arange(0, rows)
        inside = _inside(row < last, is_channel, step)
        place = _places(row, column, num_channels, step)
        value = tl.load(y + place, mask=inside, other=0).to(tl.float32) - around[None, :]
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    sums = tl.sum(total, axis=0)
    mean = sums / (last - first).to(tl.float32)
    spread = tl.maximum(tl.sum(squares, axis=0) - sums * mean, 0.0)
    place = part * num_channels + column
    tl.store(parts + place, around + mean, mask=is_channel)
    tl.store(parts + tl.num_programs(0) * num_channels + place, spread, mask=is_channel)


@triton.jit
def _settle_statistics(
    parts,
    kept,
    latest_mean,
    latest_variance,
    num_rows,
    num_channels,
    num_parts,
    part_rows,
    eps,
    parts_room: tl.constexpr,
    channels: tl.constexpr,
):
    """Join the parts; keep mean and 1 / deviation, and tell mean and unbiased variance."""
    part = tl.arange(0, parts_room)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    inside = (part < num_parts)[:, None] & is_channel[None, :]
    place = part[:, None] * num_channels + column[None, :]
    means = tl.load(parts + place, mask=inside, other=0)
    spreads = tl.load(parts + num_parts * num_channels + place, mask=inside, other=0)
    counts = tl.maximum(tl.minimum(part_rows, num_rows - part * part_rows), 0).to(tl.float32)[:, None]
    total = num_rows.to(tl.float32)
    around = tl.load(parts + column, mask=is_channel, other=0)
    mean = around + tl.sum(counts * tl.where(inside, means - around[None, :], 0.0), axis=0) / total
    away = tl.where(inside, means - mean[None, :], 0.0)
    spread = tl.sum(spreads + counts * away * away, axis=0)
    deviation = tl.sqrt(spread / total + eps)
    tl.store(kept + column, mean, mask=is_channel)
    tl.store(kept + num_channels + column, 1 / deviation, mask=is_channel)
    tl.store(latest_mean + column, mean, mask=is_channel)
    tl.store(latest_variance + column, spread / (total - 1), mask=is_channel)


@triton.jit
def _apply(
    y,
    kept,
    weight,
    bias,
    z,
    num_rows,
    num_channels,
    piece_channels,
    silu: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
):
    """Normalise and activate; pieces of the result lie one after the other."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    inside = _inside(row < num_rows, is_channel, step)
    mean = tl.load(kept + column, mask=is_channel, other=0)
    slope = tl.load(kept + num_channels + column, mask=is_channel, other=0)
    slope *= tl.load(weight + column, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_channel, other=0).to(tl.float32)
    place = _places(row, column, num_channels, step)
    value = tl.load(y + place, mask=inside, other=0).to(tl.float32)
    value = (value - mean[None, :]) * slope[None, :] + shift[None, :]
    if silu:
        value = value * tl.sigmoid(value)
    piece = (tl.program_id(1) * channels) // piece_channels
    width = piece_channels // step * step
    place = _places(row, column - piece * width, width, step) + piece.to(tl.int64) * num_rows * width
    tl.store(z + place, value.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _standard_and_gradient(
    of_first,
    of_second,
    first_pitch,
    second_pitch,
    y,
    num_channels,
    row,
    column,
    inside,
    mean,
    scale,
    weight,
    bias,
    silu: tl.constexpr,
    pieces: tl.constexpr,
    step: tl.constexpr,
):
    """Normalised values before weight and bias, and the gradient of what follows these."""
    value = tl.load(y + _places(row, column, num_channels, step), mask=inside, other=0).to(tl.float32)
    if pieces == 1:
        gradient = tl.load(of_first + _places(row, column, first_pitch, step), mask=inside, other=0).to(tl.float32)
    else:  # a tile lies in one of the pieces, so one of the two loads is of nothing
        half = num_channels // 2 // step * step
        is_second = (column >= half)[None, :]
        place = _places(row, column, first_pitch, step)
        gradient = tl.load(of_first + place, mask=inside & ~is_second, other=0).to(tl.float32)
        place = _places(row, column - half, second_pitch, step)
        gradient += tl.load(of_second + place, mask=inside & is_second, other=0).to(tl.float32)
    standard = (value - mean[None, :]) * scale[None, :]
    if silu:
        normed = standard * weight[None, :] + bias[None, :]
        share = tl.sigmoid(normed)
        gradient *= share * (1 + normed * (1 - share))
    return standard, gradient


@triton.jit
def _gradient_sums(
    of_first,
    of_second,
    first_pitch,
    second_pitch,
    y,
    kept,
    weight,
    bias,
    parts,
    num_rows,
    num_channels,
    part_rows,
    silu: tl.constexpr,
    pieces: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
):
    """Sum the gradient, and its product with the standardised values, over the rows of each part."""
    part = tl.program_id(0)
    first, last = part * part_rows, tl.minimum((part + 1) * part_rows, num_rows)
    column = tl.program_id(1) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    mean = tl.load(kept + column, mask=is_channel, other=0)
    scale = tl.load(kept + num_channels + column, mask=is_channel, other=0)
    slope = tl.load(weight + column, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_channel, other=0).to(tl.float32)
    of_bias = tl.full((rows, channels), 0.0, tl.float32)
    of_weight = tl.full((rows, channels), 0.0, tl.float32)
    for start in range(first, last, rows):
        row = start + tl.arange(0, rows)
        inside = _inside(row < last, is_channel, step)
        standard, gradient = _standard_and_gradient(
            of_first,
            of_second,
            first_pitch,
            second_pitch,
            y,
            num_channels,
            row,
            column,
            inside,
            mean,
            scale,
            slope,
            shift,
            silu,
            pieces,
            step,
        )
        of_bias += gradient
        of_weight += gradient * standard
    place = part * num_channels + column
    tl.store(parts + place, tl.sum(of_bias, axis=0), mask=is_channel)
    tl.store(parts + tl.num_programs(0) * num_channels + place, tl.sum(of_weight, axis=0), mask=is_channel)


@triton.jit
def _settle_sums(parts, sums, num_channels, num_parts, parts_room: tl.constexpr, channels: tl.constexpr):
    """Join the parts of both sums."""
    part = tl.arange(0, parts_room)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    inside = (part < num_parts)[:, None] & is_channel[None, :]
    place = part[:, None] * num_channels + column[None, :]
    tl.store(sums + column, tl.sum(tl.load(parts + place, mask=inside, other=0), axis=0), mask=is_channel)
    place += num_parts * num_channels
    tl.store(
        sums + num_channels + column, tl.sum(tl.load(parts + place, mask=inside, other=0), axis=0), mask=is_channel
    )


@triton.jit
def _apply_gradient(
    of_first,
    of_second,
    first_pitch,
    second_pitch,
    y,
    kept,
    weight,
    bias,
    of_affine,
    of_y,
    num_rows,
    num_channels,
    silu: tl.constexpr,
    pieces: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
):
    """Gradient of what was normalised, the dependence of mean and variance on it included."""
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = tl.program_id(1) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    inside = _inside(row < num_rows, is_channel, step)
    mean = tl.load(kept + column, mask=is_channel, other=0)
    scale = tl.load(kept + num_channels + column, mask=is_channel, other=0)
    slope = tl.load(weight + column, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_channel, other=0).to(tl.float32)
    count = num_rows.to(tl.float32)
    mean_of_bias = tl.load(of_affine + column, mask=is_channel, other=0) / count
    mean_of_weight = tl.load(of_affine + num_channels + column, mask=is_channel, other=0) / count
    standard, gradient = _standard_and_gradient(
        of_first,
        of_second,
        first_pitch,
        second_pitch,
        y,
        num_channels,
        row,
        column,
        inside,
        mean,
        scale,
        slope,
        shift,
        silu,
        pieces,
        step,
    )
    value = (gradient - mean_of_bias[None, :] - standard * mean_of_weight[None, :]) * (slope * scale)[None, :]
    place = _places(row, column, num_channels, step)
    tl.store(of_y + place, value.to(of_y.dtype.element_ty), mask=inside)
