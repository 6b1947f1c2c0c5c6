"""Norm kernels: batch norm in training with the activation after it, forward and backward, by Triton.

A channels-last map is a matrix of N = batch x height x width rows and C channels. What a kernel cannot do without is
one pass for the sums over the rows and one for the result, in both directions:

```
forward    statistics   y -> moments of each part of the rows                             reads y
           settle       moments -> mean, variance, 1 / deviation                          small
           apply        y -> z = silu(weight (y - mean) / deviation + bias)               reads y, writes z
backward   sums         z' y -> sum of n', sum of n' standard(y), of each part            reads z', y (*)
           settle       parts -> gradients of bias and weight                             small
           apply        z' y -> y'                                                        reads z', y, writes y'
```
What lies between norm and activation is never written: its gradient n' is computed anew from z' and y in both passes.
Statistics are left out where the convolution before has written the moments (`moment_kernels.py`). Sums are float32,
around a first value of the part, and parts are joined by counts and means of each; nothing depends on the order in
which programs run. `fused_norm.py` launches them. This module needs Triton; nothing imports it before that
is known to work.

(*) z' may have come in parts, whose sum it writes for the pass after it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.operations.moment_kernels import _joined, _write
from paceline.models.operations.turn_kernels import _num_rows_of, _num_turns, _piece
from paceline.power_kernels import sigmoid

_ANY = ("num_rows", "num_channels")
_COUNTS = ("num_first", "num_second")
"""Numbers for whose values nothing is compiled anew: networks and images come in many sizes."""


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
        value = value * sigmoid(value, ptx)
    if adds:
        value += tl.load(carried + _places(row, column, carried_pitch, step), mask=inside, other=0).to(tl.float32)
    piece = (tl.program_id(0) * channels) // piece_channels
    width = piece_channels // step * step
    place = _places(row, column - piece * width, width, step) + piece.to(tl.int64) * num_rows * width
    tl.store(z + place, value.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    gradients,
    pitches,
    num_first,
    num_second,
    num_channels,
    row,
    column,
    inside,
    pieces: tl.constexpr,
    room: tl.constexpr,
    step: tl.constexpr,
):
    """Gradient of z: the sum of what has come for the piece of it that a tile lies in.

    gradients, pitches: `room` of the first piece, then of the second, each with as many as there are before the rest.
    """
    if pieces == 1:
        total = tl.load(gradients[0] + _places(row, column, pitches[0], step), mask=inside, other=0).to(tl.float32)
        for number in tl.static_range(1, room):
            place = _places(row, column, pitches[number], step)
            total += tl.load(gradients[number] + place, mask=inside, other=0).to(tl.float32)
    else:
        is_second, column = _in_piece(num_channels, column, step)
        place = _places(row, column, tl.where(is_second, pitches[room], pitches[0]), step)
        total = tl.load(tl.where(is_second, gradients[room], gradients[0]) + place, mask=inside, other=0)
        total = total.to(tl.float32)
        for number in tl.static_range(1, room):
            is_there = tl.full((1, 1), number, tl.int32) < tl.where(is_second, num_second, num_first)
            place = _places(row, column, tl.where(is_second, pitches[room + number], pitches[number]), step)
            start = tl.where(is_second, gradients[room + number], gradients[number])
            total += tl.load(start + place, mask=inside & is_there, other=0).to(tl.float32)
    return total


@triton.jit
def _in_piece(num_channels, column, step: tl.constexpr):
    """Whether a tile lies in the second of two pieces, and its channels there."""
    half = num_channels // 2 // step * step
    is_second = tl.program_id(0) * column.shape[0] >= half
    return is_second, column - tl.where(is_second, half, 0)


@triton.jit
def _rounded(
    gradient,
    totals,
    num_first,
    num_second,
    num_channels,
    row,
    column,
    inside,
    pieces: tl.constexpr,
    step: tl.constexpr,
):
    """Round the sum of several gradients to their type, and write it; a single one stays where it lies."""
    value = gradient.to(totals[0].dtype.element_ty)
    if pieces == 1:
        tl.store(totals[0] + _places(row, column, num_channels, step), value, mask=inside)
    else:
        is_second, column = _in_piece(num_channels, column, step)
        place = _places(row, column, num_channels // 2, step)
        are_several = tl.full((1, 1), 1, tl.int32) < tl.where(is_second, num_second, num_first)
        tl.store(tl.where(is_second, totals[1], totals[0]) + place, value, mask=inside & are_several)
    return value.to(tl.float32)


@triton.jit
def _centred_and_sloped(
    gradient,
    y,
    num_channels,
    row,
    column,
    inside,
    mean,
    slope,
    shift,
    silu: tl.constexpr,
    step: tl.constexpr,
    ptx: tl.constexpr,
):
    """Values around their mean, and the gradient of what lies between norm and activation."""
    value = tl.load(y + _places(row, column, num_channels, step), mask=inside, other=0).to(tl.float32)
    centred = value - mean[None, :]
    if silu:
        normed = centred * slope[None, :] + shift[None, :]
        share = sigmoid(normed, ptx)
        activated = normed * share
        gradient *= share + (activated - activated * share)
    return centred, gradient


@triton.jit(do_not_specialize=(*_ANY, *_COUNTS))
def _gradient_sums(
    gradients,
    pitches,
    totals,
    num_first,
    num_second,
    y,
    kept,
    weight,
    bias,
    parts,
    num_rows,
    num_channels,
    silu: tl.constexpr,
    pieces: tl.constexpr,
    room: tl.constexpr,
    rows: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    ptx: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradient, and its product with the standardised values, over the rows of each part.

    totals: of each piece what takes the sum of its gradients, if there are several.
    """
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
        gradient = _gradient(
            gradients, pitches, num_first, num_second, num_channels, row, column, inside, pieces, room, step
        )
        if room > 1:
            gradient = _rounded(
                gradient, totals, num_first, num_second, num_channels, row, column, inside, pieces, step
            )
        centred, gradient = _centred_and_sloped(
            gradient, y, num_channels, row, column, inside, mean, slope, shift, silu, step, ptx
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


@triton.jit(do_not_specialize=_ANY)
def _apply_gradient(
    gradients,
    pitches,
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
    gradient = _gradient(gradients, pitches, 1, 1, num_channels, row, column, inside, pieces, 1, step)
    centred, gradient = _centred_and_sloped(
        gradient, y, num_channels, row, column, inside, mean, slope, shift, silu, step, ptx
    )
    value = gradient * slope[None, :] - (centred * rise[None, :] + constant[None, :])
    place = _places(row, column, num_channels, step)
    tl.store(of_y + place, value.to(of_y.dtype.element_ty), mask=inside)
