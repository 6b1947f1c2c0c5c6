"""End kernels: the last convolutions of a head's branches, written where their points are joined, by Triton.

A level of a head is a matrix x of M = batch x cells rows and K channels, and its last convolution, 1 x 1 with a bias,
gives N numbers for each of its cells: a point. The points of all levels are one matrix for each image, in which a level
has rows of its own, so the rows of two images lie as far apart as an image has points:

```
          x, of a level           y, of all levels
image 0   cells of image 0        other levels | cells of image 0 | other levels
image 1   cells of image 1        other levels | cells of image 1 | other levels

multiply      y[m, n]   =  b[n] + sum over k of x[m, k] W[n, k]      reads x, writes the level's part of y
multiply      x'[m, k]  =         sum over n of y'[m, n] W[n, k]     reads that part of y', writes x'
end parts     W'[n, k]  =  sum over m of y'[m, n] x[m, k]            reads that part of y', and x; for each part of the
              b'[n]     =  sum over m of y'[m, n]                    rows, all W' and then all b'
```
So nothing is joined afterwards, and no part of y' is copied. Sums are float32 and rounded once; those over rows are
added in one order. `fused_ends.py` launches them. This module needs Triton; nothing imports it before that is known to
work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.operations.turn_kernels import _num_turns, _piece

STEP = tl.constexpr(8)
"""What the channels of a level are a multiple of: as many are loaded at once."""
ONES = tl.constexpr(16)
"""The least number of columns that matrices are multiplied by."""


@triton.jit
def _rows_of(values, row, image_cells, image_pitch, pitch, step: tl.constexpr):
    """Where rows begin, if images and their cells lie so far apart, in multiples of `step`."""
    image = row // image_cells
    cell = row - image * image_cells
    place = image.to(tl.int64) * (image_pitch // step * step) + cell.to(tl.int64) * (pitch // step * step)
    return values + place


@triton.jit
def _factors(weight, summed, found, num_summed: tl.constexpr, num_found: tl.constexpr, turned: tl.constexpr):
    """Weights by what is summed and what is found; turned: they lie so, else found by summed."""
    inside = (summed < num_summed)[:, None] & (found < num_found)[None, :]
    if turned:
        place = weight + (summed[:, None] * num_found + found[None, :])
        return tl.load(place, mask=inside, other=0)
    place = weight + (found[:, None] * num_summed + summed[None, :])
    return tl.trans(tl.load(place, mask=tl.trans(inside), other=0))


@triton.jit
def _store(target, value, bias, is_row, column, num_found: tl.constexpr, adds: tl.constexpr):
    """Round what was summed, with a bias, and write it."""
    is_column = column < num_found
    if adds:
        value += tl.load(bias + column, mask=is_column, other=0).to(tl.float32)[None, :]
    place = target[:, None] + column[None, :]
    tl.store(place, value.to(target.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit(do_not_specialize=("given_image_pitch", "found_image_pitch", "num_rows", "image_cells"))
def _multiply_end(
    given,
    given_image_pitch,
    given_pitch,
    weight,
    bias,
    found,
    found_image_pitch,
    found_pitch,
    num_rows,
    image_cells,
    num_summed: tl.constexpr,
    num_found: tl.constexpr,
    given_step: tl.constexpr,
    found_step: tl.constexpr,
    turned: tl.constexpr,
    adds: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    more: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
):
    """Multiply `rows` rows by `columns` + `more` columns of weights, `depth` products of each number at once.

    Two widths, since a width is a power of two, and 80 is 64 + 16; more: may be none. adds: whether there is a bias.
    """
    blocks: tl.constexpr = (num_found + columns + more - 1) // (columns + more)
    row = tl.program_id(0) // blocks * rows + tl.arange(0, rows)
    first = tl.program_id(0) % blocks * (columns + more)
    is_row = row < num_rows
    source = _rows_of(given, row, image_cells, given_image_pitch, given_pitch, given_step)
    column = first + tl.arange(0, columns)
    total = tl.full((rows, columns), 0.0, tl.float32)
    if more:
        column_more = first + columns + tl.arange(0, more)
        total_more = tl.full((rows, more), 0.0, tl.float32)
    for start in tl.range(0, num_summed, depth, num_stages=stages):
        summed = start + tl.arange(0, depth)
        inside = is_row[:, None] & (summed < num_summed)[None, :]
        values = tl.load(source[:, None] + summed[None, :], mask=inside, other=0)
        factors = _factors(weight, summed, column, num_summed, num_found, turned)
        total = tl.dot(values, factors, total, input_precision="ieee")
        if more:
            factors_more = _factors(weight, summed, column_more, num_summed, num_found, turned)
            total_more = tl.dot(values, factors_more, total_more, input_precision="ieee")
    target = _rows_of(found, row, image_cells, found_image_pitch, found_pitch, found_step)
    _store(target, total, bias, is_row, column, num_found, adds)
    if more:
        _store(target, total_more, bias, is_row, column_more, num_found, adds)


@triton.jit(do_not_specialize=("of_y_image_pitch", "x_image_pitch", "num_rows", "image_cells"))
def _end_parts(
    of_y,
    of_y_image_pitch,
    of_y_pitch,
    x,
    x_image_pitch,
    x_pitch,
    parts,
    num_rows,
    image_cells,
    num_in: tl.constexpr,
    num_out: tl.constexpr,
    step: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradients of `rows` x `columns` weights, and of `rows` biases, over one part, `depth` cells at once.

    parts: of each part the weights, out, in, and then the biases, which are sums of products with one.
    """
    across: tl.constexpr = (num_in + columns - 1) // columns
    blocks: tl.constexpr = across * ((num_out + rows - 1) // rows)
    part, block, num_parts = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.num_programs(0) // blocks
    out = block // across * rows + tl.arange(0, rows)
    column = block % across * columns + tl.arange(0, columns)
    is_out, is_column = out < num_out, column < num_in
    num_pieces = tl.cdiv(num_rows, depth)
    one = tl.full((depth, ONES), 1.0, of_y.dtype.element_ty)
    total = tl.full((rows, columns), 0.0, tl.float32)
    of_bias = tl.full((rows, ONES), 0.0, tl.float32)
    for turn in tl.range(0, _num_turns(part, num_parts, num_pieces), num_stages=stages):
        row = _piece(turn, part, num_parts) * depth + tl.arange(0, depth)
        is_row = row < num_rows
        place = _rows_of(of_y, row, image_cells, of_y_image_pitch, of_y_pitch, step)
        gradient = tl.load(place[:, None] + out[None, :], mask=is_row[:, None] & is_out[None, :], other=0)
        place = _rows_of(x, row, image_cells, x_image_pitch, x_pitch, STEP)
        values = tl.load(place[:, None] + column[None, :], mask=is_row[:, None] & is_column[None, :], other=0)
        gradient = tl.trans(gradient)
        total = tl.dot(gradient, values, total, input_precision="ieee")
        of_bias = tl.dot(gradient, one, of_bias, input_precision="ieee")
    mine = parts + part.to(tl.int64) * (num_out * num_in + num_out)
    place = mine + (out[:, None] * num_in + column[None, :])
    tl.store(place, total, mask=is_out[:, None] & is_column[None, :])
    same = tl.arange(0, ONES)  # columns, of which one is enough, from the first of the blocks with these biases
    is_first = same == block % across * ONES
    place = mine + num_out * num_in + out[:, None] + same[None, :]
    tl.store(place, of_bias, mask=is_out[:, None] & is_first[None, :])
