"""Joint kernels: a 1 x 1 convolution over several maps as if they were joined, and its gradients, by Triton.

Channels-last maps of one size are matrices x_p of M = batch x height x width rows and K_p channels. Side by side they
are a matrix x of K channels that is never written: a tile of it is loaded from wherever its channels lie, eight at a
time, so the widths may be any multiples of eight.

```
convolve          y[m, n]    =  sum over k of x[m, k] W[n, k]      reads x, writes y, and the moments of its parts
piece gradients   x'_p[m, k] =  sum over n of y'[m, n] W[n, k]     reads y', writes x'_p as maps of their own
weight parts      W'[n, k]   =  sum over m of y'[m, n] x[m, k]     reads y', x; for each part of the rows
settle            parts -> W'                                      small
```
Programs that need the same rows follow each other, so that all but the first find them in the cache. Sums are float32,
and those over the rows are added in one order. `fused_joint.py` launches them. This module needs Triton; nothing
imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.operations.moment_kernels import _note
from paceline.models.operations.turn_kernels import _num_turns, _piece

STEP = tl.constexpr(8)
"""Channels that are loaded at once, and what all widths and distances between rows are multiples of."""


@triton.jit
def _places(pieces, pitches, ends, row, column, room: tl.constexpr):
    """Where the channels of rows lie.

    pieces, pitches, ends: of each of the `room` maps its first number, how far apart its rows are, and how many
    channels there are up to its end; maps after the last one begin where no channel is.
    """
    start = pieces[0] + column
    pitch = tl.full(column.shape, 0, tl.int32) + pitches[0] // STEP * STEP
    for number in tl.static_range(1, room):
        first = ends[number - 1] // STEP * STEP
        beyond = column >= first
        start = tl.where(beyond, pieces[number] + (column - first), start)
        pitch = tl.where(beyond, pitches[number] // STEP * STEP, pitch)
    place = start[None, :] + row.to(tl.int64)[:, None] * pitch[None, :]
    return tl.max_contiguous(tl.multiple_of(place, (1, 2 * STEP)), (1, STEP))  # in bytes, in numbers


@triton.jit(do_not_specialize=("num_rows",))
def _convolve_joint(
    pieces,
    pitches,
    ends,
    weight,
    y,
    moments,
    num_rows,
    num_in,
    num_out,
    notes: tl.constexpr,
    room: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
):
    """Convolve `rows` cells to `columns` channels; `depth` channels of x are multiplied at once.

    notes: whether the moments of the cells are written, as one part.
    """
    num_in, num_out = num_in // STEP * STEP, num_out // STEP * STEP
    blocks = tl.cdiv(num_out, columns)
    row = tl.program_id(0) // blocks * rows + tl.arange(0, rows)
    out = tl.program_id(0) % blocks * columns + tl.arange(0, columns)
    is_row, is_out = row < num_rows, out < num_out
    total = tl.full((rows, columns), 0.0, tl.float32)
    for first in tl.range(0, num_in, depth, num_stages=stages):
        column = first + tl.arange(0, depth)
        is_column = column < num_in
        place = _places(pieces, pitches, ends, row, column, room)
        values = tl.load(place, mask=is_row[:, None] & is_column[None, :], other=0)
        place = out[:, None] * num_in + column[None, :]
        factors = tl.load(weight + place, mask=is_out[:, None] & is_column[None, :], other=0)
        total = tl.dot(values, tl.trans(factors), total, input_precision="ieee")
    place = y + row.to(tl.int64)[:, None] * num_out + out[None, :]
    value = total.to(y.dtype.element_ty)
    tl.store(place, value, mask=is_row[:, None] & is_out[None, :])
    if notes:
        part, parts = tl.program_id(0) // blocks, tl.num_programs(0) // blocks
        count = tl.minimum(rows, num_rows - part * rows).to(tl.float32)
        _note(value, is_row, count, part, parts, out, is_out, num_out, moments)


@triton.jit(do_not_specialize=("num_rows",))
def _piece_gradients(
    of_y,
    of_y_pitch,
    weight,
    pieces,
    pitches,
    ends,
    num_rows,
    num_in,
    num_out,
    room: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
):
    """Gradient of `columns` channels of x at `rows` cells, into `pieces`; `depth` channels of y' go in at once."""
    num_in, num_out, of_y_pitch = num_in // STEP * STEP, num_out // STEP * STEP, of_y_pitch // STEP * STEP
    blocks = tl.cdiv(num_in, columns)
    row = tl.program_id(0) // blocks * rows + tl.arange(0, rows)
    column = tl.program_id(0) % blocks * columns + tl.arange(0, columns)
    is_row, is_column = row < num_rows, column < num_in
    total = tl.full((rows, columns), 0.0, tl.float32)
    for first in tl.range(0, num_out, depth, num_stages=stages):
        out = first + tl.arange(0, depth)
        is_out = out < num_out
        place = of_y + row.to(tl.int64)[:, None] * of_y_pitch + out[None, :]
        gradient = tl.load(place, mask=is_row[:, None] & is_out[None, :], other=0)
        place = out[:, None] * num_in + column[None, :]
        factors = tl.load(weight + place, mask=is_out[:, None] & is_column[None, :], other=0)
        total = tl.dot(gradient, factors, total, input_precision="ieee")
    place = _places(pieces, pitches, ends, row, column, room)
    tl.store(place, total.to(pieces[0].dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=("num_rows",))
def _weight_parts(
    of_y,
    of_y_pitch,
    pieces,
    pitches,
    ends,
    parts,
    num_rows,
    num_in,
    num_out,
    room: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradient of `rows` x `columns` weights over the cells of one part, `depth` of them at once.

    parts: part, out, in.
    """
    num_in, num_out, of_y_pitch = num_in // STEP * STEP, num_out // STEP * STEP, of_y_pitch // STEP * STEP
    across = tl.cdiv(num_in, columns)
    blocks = across * tl.cdiv(num_out, rows)
    part, block, num_parts = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.num_programs(0) // blocks
    out = block // across * rows + tl.arange(0, rows)
    column = block % across * columns + tl.arange(0, columns)
    is_out, is_column = out < num_out, column < num_in
    num_pieces = tl.cdiv(num_rows, depth)
    total = tl.full((rows, columns), 0.0, tl.float32)
    for turn in tl.range(0, _num_turns(part, num_parts, num_pieces), num_stages=stages):
        row = _piece(turn, part, num_parts) * depth + tl.arange(0, depth)
        is_row = row < num_rows
        place = of_y + row.to(tl.int64)[:, None] * of_y_pitch + out[None, :]
        gradient = tl.load(place, mask=is_row[:, None] & is_out[None, :], other=0)
        place = _places(pieces, pitches, ends, row, column, room)
        values = tl.load(place, mask=is_row[:, None] & is_column[None, :], other=0)
        total = tl.dot(tl.trans(gradient), values, total, input_precision="ieee")
    place = parts + (part.to(tl.int64) * num_out + out)[:, None] * num_in + column[None, :]
    tl.store(place, total, mask=is_out[:, None] & is_column[None, :])
