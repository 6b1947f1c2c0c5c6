"""Norm kernels: batch norm in training with the activation after it, forward and backward, by Triton.

A channels-last map is a matrix of N = batch x height x width rows and C channels. What a kernel cannot do without is
one pass for the sums over the rows and one for the result, in both directions:

```
forward    statistics   y -> moments of each part of the rows                             reads y
           settle       moments -> mean, variance, 1 / deviation                          small
           apply        y -> z = silu(weight (y - mean) / deviation + bias)               reads y, writes z
backward   sums         z' y -> sum of n', sum of n' standard(y), of each part            reads z', y
           settle       parts -> gradients of bias and weight                             small
           apply        z' y -> y'                                                        reads z', y, writes y'
```
What lies between norm and activation is never written: its gradient n' is computed anew from z' and y in both passes.
Statistics are left out where the convolution before has written the moments (`moment_kernels.py`). Sums are float32,
around a first value of the part, and parts are joined by counts and means of each; nothing depends on the order in
which programs run. `fused_norm.py` launches them. This module needs Triton; nothing imports it before that
is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.moment_kernels import _joined, _write
from paceline.models.turn_kernels import _num_rows_of, _num_turns, _piece

_ANY = ("num_rows", "num_channels")
_PITCHES = ("first_pitch", "second_pitch")
"""Numbers for whose values nothing is compiled anew: networks and images come in many sizes."""


@triton.jit
def _places(row, column, pitch, step: tl.constexpr):
    """Where the channels of rows lie; the compiler is told that rows begin at multiples of `step`."""
    return row.to(tl.int64)[:, None] * (pitch // step * step) + column[None, :]


@triton.jit
def _sigmoid(x, ptx: tl.constexpr):
    """1 / (1 + e^-x); by four instructions on NVIDIA's GPUs, where Triton's own takes care of subnormal numbers."""
    if ptx:
        return tl.inline_asm_elementwise(
            """{
            mul.ftz.f32 $0, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 $0, $0;
            add.ftz.f32 $0, $0, 0f3F800000;
            rcp.approx.ftz.f32 $0, $0;
            }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.sigmoid(x)


@triton.jit
def _inside(is_row, is_channel, step: tl.constexpr):
    """Which numbers of a tile there are; tiles are as wide as divides the channels where `step` is not 1."""
    if step == 1:
        return is_row[:, None] & is_channel[None, :]
    return is_row[:, None] & tl.full(is_channel.shape, 1, tl.int1)[None, :]


@triton.jit
def _number():
    """Which of the tiles below each other this program has; beyond the last one there may be a few that are empty."""
    return tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)


@triton.jit(do_not_specialize=_ANY)
def _statistics(
    y,
    moments,
    num_rows,
    num_channels,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    stages: tl.constexpr,
):
    """Mean, and sum of squares around it, of the rows of each part."""
    part, parts, pieces = tl.program_id(1), tl.num_programs(1), tl.cdiv(num_rows, rows)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    first = part * rows
    around = tl.load(y + first.to(tl.int64) * num_channels + column, mask=is_channel, other=0).to(tl.float32)
    total = tl.full((rows, channels), 0.0, tl.float32)
    squares = tl.full((rows, channels), 0.0, tl.float32)
    for turn in tl.range(0, _num_turns(part, parts, pieces), num_stages=stages):
        row = _piece(turn, part, parts) * rows + tl.arange(0, rows)
        inside = _inside(row < num_rows, is_channel, step)
        place = _places(row, column, num_channels, step)
        value = tl.load(y + place, mask=inside, other=0).to(tl.float32) - around[None, :]
        value = tl.where(inside, value, 0.0)
        total += value
        squares += value * value
    sums = tl.sum(total, axis=0)
    count = _num_rows_of(part, parts, pieces, num_rows, rows).to(tl.float32)
    mean = sums / count
    spread = tl.maximum(tl.sum(squares, axis=0) - sums * mean, 0.0)
    _write(around + mean, spread, part, parts, column, is_channel, num_channels, moments)
    tl.store(moments + 2 * parts.to(tl.int64) * num_channels + part, count)


@triton.jit(do_not_specialize=("num_rows", "num_channels", "num_parts"))
def _settle_statistics(
    moments,
    kept,
    latest_mean,
    latest_variance,
    num_rows,
    num_channels,
    num_parts,
    eps,
    parts_room: tl.constexpr,
    channels: tl.constexpr,
):
    """Join the parts; keep mean and 1 / deviation, and tell mean and unbiased variance."""
    part = tl.arange(0, parts_room)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    _, mean, spread = _joined(moments, num_parts * 0, part, num_parts, column, is_channel, num_channels)
    total = num_rows.to(tl.float32)
    deviation = tl.sqrt(spread / total + eps)
    tl.store(kept + column, mean, mask=is_channel)
    tl.store(kept + num_channels + column, 1 / deviation, mask=is_channel)
    tl.store(latest_mean + column, mean, mask=is_channel)
    tl.store(latest_variance + column, spread / (total - 1), mask=is_channel)


@triton.jit(do_not_specialize=(*_ANY, "piece_channels", "carried_pitch"))
def _apply(
    y,
    kept,
    weight,
    bias,
    carried,
    z,
    num_rows,
    num_channels,
    piece_channels,
    carried_pitch,
    silu: tl.constexpr,
    adds: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    ptx: tl.constexpr,
):
    """Normalise, activate and add what is carried; pieces of the result lie one after the other."""
    num_channels = num_channels // step * step
    row = _number() * rows + tl.arange(0, rows)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
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
        value = value * _sigmoid(value, ptx)
    if adds:
        value += tl.load(carried + _places(row, column, carried_pitch, step), mask=inside, other=0).to(tl.float32)
    piece = (tl.program_id(0) * channels) // piece_channels
    width = piece_channels // step * step
    place = _places(row, column - piece * width, width, step) + piece.to(tl.int64) * num_rows * width
    tl.store(z + place, value.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _centred_and_gradient(
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
    slope,
    shift,
    silu: tl.constexpr,
    pieces: tl.constexpr,
    step: tl.constexpr,
    ptx: tl.constexpr,
):
    """Values around their mean, and the gradient of what lies between norm and activation."""
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
    centred = value - mean[None, :]
    if silu:
        normed = centred * slope[None, :] + shift[None, :]
        share = _sigmoid(normed, ptx)
        activated = normed * share
        gradient *= share + (activated - activated * share)
    return centred, gradient


@triton.jit(do_not_specialize=(*_ANY, *_PITCHES))
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
    silu: tl.constexpr,
    pieces: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    ptx: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradient, and its product with the standardised values, over the rows of each part."""
    num_channels = num_channels // step * step
    part, num_parts, num_pieces = tl.program_id(1), tl.num_programs(1), tl.cdiv(num_rows, rows)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    mean = tl.load(kept + column, mask=is_channel, other=0)
    scale = tl.load(kept + num_channels + column, mask=is_channel, other=0)
    slope = scale * tl.load(weight + column, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_channel, other=0).to(tl.float32)
    of_bias = tl.full((rows, channels), 0.0, tl.float32)
    of_weight = tl.full((rows, channels), 0.0, tl.float32)
    for turn in tl.range(0, _num_turns(part, num_parts, num_pieces), num_stages=stages):
        row = _piece(turn, part, num_parts) * rows + tl.arange(0, rows)
        inside = _inside(row < num_rows, is_channel, step)
        centred, gradient = _centred_and_gradient(
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
            slope,
            shift,
            silu,
            pieces,
            step,
            ptx,
        )
        of_bias += gradient
        of_weight += gradient * centred
    place = part * num_channels + column
    tl.store(parts + place, tl.sum(of_bias, axis=0), mask=is_channel)
    tl.store(parts + num_parts * num_channels + place, tl.sum(of_weight, axis=0) * scale, mask=is_channel)


@triton.jit(do_not_specialize=("num_channels", "num_parts"))
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


@triton.jit(do_not_specialize=(*_ANY, *_PITCHES))
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
    ptx: tl.constexpr,
):
    """Gradient of what was normalised, the dependence of mean and variance on it included."""
    num_channels = num_channels // step * step
    row = _number() * rows + tl.arange(0, rows)
    column = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = column < num_channels
    inside = _inside(row < num_rows, is_channel, step)
    mean = tl.load(kept + column, mask=is_channel, other=0)
    scale = tl.load(kept + num_channels + column, mask=is_channel, other=0)
    slope = scale * tl.load(weight + column, mask=is_channel, other=0).to(tl.float32)
    shift = tl.load(bias + column, mask=is_channel, other=0).to(tl.float32)
    count = num_rows.to(tl.float32)
    constant = tl.load(of_affine + column, mask=is_channel, other=0) / count * slope
    rise = tl.load(of_affine + num_channels + column, mask=is_channel, other=0) / count * slope * scale
    centred, gradient = _centred_and_gradient(
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
        slope,
        shift,
        silu,
        pieces,
        step,
        ptx,
    )
    value = gradient * slope[None, :] - (centred * rise[None, :] + constant[None, :])
    place = _places(row, column, num_channels, step)
    tl.store(of_y + place, value.to(of_y.dtype.element_ty), mask=inside)
