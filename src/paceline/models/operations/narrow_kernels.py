"""Narrow kernels: 3 x 3 convolutions of maps with few channels, and their gradients, by Triton.

In a channels-last map the three cells below each other's left and right are neighbours in memory: a line of a window is
3 C numbers in a row. So a convolution is three products of matrices, one for each line ky of the window,

```
y[cell, n]         =  sum over ky of  line(ky)[cell, (kx, c)]  W[n, ky, (kx, c)]
W'[n, ky, (kx, c)] =  sum over cells of  y'[cell, n]  line(ky)[cell, (kx, c)]
```
and the gradient of the map, at stride 1, is the convolution of y' with the weights turned around. At stride 2 two cells
beside each other, of an even column and the odd one after it, are 2 C numbers in a row, and what they depend on is two
neighbours in a line of y', 2 N numbers in a row: three products again, one for each ky.

A program goes down strips of lines, some beside each other, and loads each line once, while the lines that come are on
their way: three products with it, for the three lines of the result that see it. At stride 1 a row is four cells, 4 C
numbers, which is a power of two as a rule, and gives two cells of the result, 2 N numbers, by weights of which a third
are 0, where a program has registers for them:

```
x lines  i - 1   i   i + 1              a row: cells 2p-1 2p 2p+1 2p+2   gives 2p 2p+1
y line   i  =  W0 + W1 + W2
```
Of many channels a program would have room for few rows. There the convolution is nine products, one for each cell of
the windows, and a program has a tile of one image; what it loads nine times is in the cache.

Sums are float32; those of the weights are written by each program for itself and added afterwards, in one order.
`narrow_conv.py` launches them. This module needs Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.operations.moment_kernels import _note, _write

_ANY = ("height", "width", "out_height", "out_width", "num_strips", "strips_down", "tiles_across", "lines", "halvings")
"""Numbers for whose values nothing is compiled anew: images come in many sizes."""
_CELLS = tl.constexpr(4)
"""Beside each other, that a row of a product has: what two outputs see at stride 1, and one at stride 2."""


@triton.jit
def _strips_of(tile, num_strips, strips_down, tiles_across, lines, rows: tl.constexpr, halvings):
    """Image, first line and column of the rows of a tile, and whether there is such a strip."""
    row = tl.arange(0, rows)
    strip = tile // tiles_across * (rows >> halvings) + (row >> halvings)
    column = ((tile % tiles_across) << halvings) + (row & ((1 << halvings) - 1))
    return strip // strips_down, strip % strips_down * lines, column, strip < num_strips


@triton.jit
def _bands(
    weight,
    ky: tl.constexpr,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    outputs: tl.constexpr,
    turned: tl.constexpr,
):
    """Weights that lead from four cells of a line to `outputs` beside each other: room x out_room, 0 where none do.

    weight: out, 3, 3, in; turned: in, 3, 3, out.
    """
    number, place = tl.arange(0, room), tl.arange(0, out_room)
    cell, channel = number // in_channels, number % in_channels
    output, out = place // out_channels, place % out_channels
    kx = cell[:, None] - output[None, :]
    is_weight = (kx >= 0) & (kx < 3) & (cell < _CELLS)[:, None] & (output < outputs)[None, :]
    if turned:
        place = ((channel[:, None] * 3 + (2 - ky)) * 3 + (2 - kx)) * out_channels + out[None, :]
    else:
        place = ((out[None, :] * 3 + ky) * 3 + kx) * in_channels + channel[:, None]
    return tl.load(weight + place, mask=is_weight, other=0)


@triton.jit
def _line(first, line, height, pitch, inside):
    """Cells of a line of each strip: rows x room; 0 beyond the edges."""
    is_line = (line >= 0) & (line < height)
    return tl.load(first + (line * pitch)[:, None], mask=inside & is_line[:, None], other=0)


@triton.jit
def _stored(total, y, line, end, pitch, is_output):
    """Store a line of each strip, rounded; returns the numbers as they are stored, and which there are."""
    inside = is_output & (line < end)[:, None]
    value = total.to(y.dtype.element_ty)
    tl.store(y + (line * pitch)[:, None], value, mask=inside)
    return value, inside


@triton.jit
def _taken_in(value, inside, is_first, around, sums, squares):
    """Add a line to the sums around the first line of each strip."""
    around = tl.where(is_first, value, around)
    away = tl.where(inside, value.to(tl.float32) - around.to(tl.float32), 0.0)
    return around, sums + away, squares + away * away


@triton.jit
def _all_taken_in(around, sums, squares, counts):
    """Count, mean and spread of each column; those of a strip are known by its own count."""
    known = tl.maximum(counts, 1.0)
    means = tl.where(
        counts > 0, around.to(tl.float32) + sums / known, 0.0
    )  # beyond an edge there is what counts nothing
    count = tl.sum(counts, axis=0)
    mean = tl.sum(counts * means, axis=0) / tl.maximum(count, 1.0)
    away = means - mean[None, :]
    return count, mean, tl.sum(squares - sums * (sums / known) + counts * away * away, axis=0)


@triton.jit(do_not_specialize=_ANY)
def _convolve_narrow(
    x,
    weight,
    y,
    moments,
    height,
    width,
    out_height,
    out_width,
    num_strips,
    strips_down,
    tiles_across,
    lines,
    halvings,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    stride: tl.constexpr,
    turned: tl.constexpr,
    notes: tl.constexpr,
    outputs: tl.constexpr,
    rows: tl.constexpr,
    stages: tl.constexpr,
):
    """Convolve strips of `lines` lines, going down.

    A row is four cells beside each other, which `outputs` cells of y depend on; a tile has 2^`halvings` rows of
    each of its strips. weight: out, 3, 3, in; turned: in, 3, 3, out, of a convolution from y to x, of whose map this
    is the gradient. notes: whether the moments are written, each output of the rows of a program being a part.
    """
    tile = tl.program_id(0)
    number, place = tl.arange(0, room), tl.arange(0, out_room)
    image, top, column, is_strip = _strips_of(tile, num_strips, strips_down, tiles_across, lines, rows, halvings)
    left, end = column * outputs, tl.minimum(top + lines, out_height)
    at = (left * stride - 1)[:, None] + (number // in_channels)[None, :]
    inside = is_strip[:, None] & (at >= 0) & (at < width) & (number < _CELLS * in_channels)[None, :]
    first = (left * stride - 1) * in_channels
    first = x + (image.to(tl.int64) * (height * width * in_channels) + first)[:, None] + number[None, :]
    pitch = width * in_channels
    output = place // out_channels
    is_output = (left[:, None] + output[None, :] < out_width) & (output < outputs)[None, :]
    is_output = is_output & is_strip[:, None]
    first_y = left * out_channels
    first_y = y + (image.to(tl.int64) * (out_height * out_width * out_channels) + first_y)[:, None] + place[None, :]
    pitch_y = out_width * out_channels
    upper = _bands(weight, 0, in_channels, out_channels, room, out_room, outputs, turned)
    middle = _bands(weight, 1, in_channels, out_channels, room, out_room, outputs, turned)
    lower = _bands(weight, 2, in_channels, out_channels, room, out_room, outputs, turned)
    around = tl.full((rows, out_room), 0.0, tl.float32).to(y.dtype.element_ty)
    sums = tl.full((rows, out_room), 0.0, tl.float32)
    squares = tl.full((rows, out_room), 0.0, tl.float32)
    values = _line(first, top * stride - 1, height, pitch, inside)
    coming = tl.dot(values, upper, input_precision="ieee")  # of the line that is stored next
    if stride == 1:
        values = _line(first, top, height, pitch, inside)
        total = tl.dot(values, middle, coming, input_precision="ieee")
        coming = tl.dot(values, upper, input_precision="ieee")
        for turn in tl.range(0, lines, num_stages=stages):
            values = _line(first, top + turn + 1, height, pitch, inside)
            total = tl.dot(values, lower, total, input_precision="ieee")
            value, is_there = _stored(total, first_y, top + turn, end, pitch_y, is_output)
            if notes:
                around, sums, squares = _taken_in(value, is_there, turn == 0, around, sums, squares)
            total = tl.dot(values, middle, coming, input_precision="ieee")
            coming = tl.dot(values, upper, input_precision="ieee")
    else:
        for turn in tl.range(0, lines, num_stages=stages):
            line = (top + turn) * stride
            values = _line(first, line, height, pitch, inside)
            total = tl.dot(values, middle, coming, input_precision="ieee")
            values = _line(first, line + 1, height, pitch, inside)
            total = tl.dot(values, lower, total, input_precision="ieee")
            value, is_there = _stored(total, first_y, top + turn, end, pitch_y, is_output)
            if notes:
                around, sums, squares = _taken_in(value, is_there, turn == 0, around, sums, squares)
            coming = tl.dot(values, upper, input_precision="ieee")
    if notes:
        counts = tl.where(is_output, (end - top)[:, None].to(tl.float32), 0.0)
        count, mean, spread = _all_taken_in(around, sums, squares, counts)
        parts = tl.num_programs(0) * outputs
        is_number = output < outputs
        _write(mean, spread, tile * outputs, parts, place, is_number, out_channels, moments)
        is_count = is_number & (place % out_channels == 0)
        tl.store(moments + 2 * parts.to(tl.int64) * out_channels + tile * outputs + output, count, mask=is_count)


@triton.jit(do_not_specialize=("height", "width", "out_height", "out_width", "tiles_down", "tiles_across"))
def _convolve_cells(
    x,
    weight,
    y,
    moments,
    height,
    width,
    out_height,
    out_width,
    tiles_down,
    tiles_across,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    stride: tl.constexpr,
    turned: tl.constexpr,
    notes: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
    stages: tl.constexpr,
):
    """Convolve a tile of `lines` x `columns` cells of one image by nine products, one for each cell of the windows.

    weight: out, 3, 3, in; turned: in, 3, 3, out, as above. notes: whether the moments of the tile are written, as one
    part.
    """
    tile = tl.program_id(0)
    number, out, cell = tl.arange(0, room), tl.arange(0, out_room), tl.arange(0, lines * columns)
    image, within = tile // (tiles_down * tiles_across), tile % (tiles_down * tiles_across)
    top, left = within // tiles_across * lines, within % tiles_across * columns
    line, column = top + cell // columns, left + cell % columns
    first = x + image.to(tl.int64) * (height * width * in_channels)
    is_weight = (number < in_channels)[:, None] & (out < out_channels)[None, :]
    total = tl.full((lines * columns, out_room), 0.0, tl.float32)
    for nth in tl.range(9, num_stages=stages):
        above, at = line * stride + (nth // 3 - 1), column * stride + (nth % 3 - 1)
        inside = ((above >= 0) & (above < height) & (at >= 0) & (at < width))[:, None]
        inside = inside & (number < in_channels)[None, :]
        place = ((above * width + at) * in_channels)[:, None] + number[None, :]  # within an image 32 bits will do
        values = tl.load(first + place, mask=inside, other=0)
        if turned:
            place = ((number * 9 + (8 - nth)) * out_channels)[:, None] + out[None, :]
        else:
            place = (out * 9 * in_channels)[None, :] + (nth * in_channels + number)[:, None]
        factors = tl.load(weight + place, mask=is_weight, other=0)
        total = tl.dot(values, factors, total, input_precision="ieee")
    is_cell, is_out = (line < out_height) & (column < out_width), out < out_channels
    place = ((line * out_width + column) * out_channels)[:, None] + out[None, :]
    first = y + image.to(tl.int64) * (out_height * out_width * out_channels)
    if notes:  # of cells beyond an edge, which see some of the map, nothing may be summed up
        total = tl.where(is_cell[:, None], total, 0.0)
    value = total.to(y.dtype.element_ty)
    tl.store(first + place, value, mask=is_cell[:, None] & is_out[None, :])
    if notes:
        count = tl.minimum(lines, out_height - top) * tl.minimum(columns, out_width - left)
        _note(value, is_cell, count.to(tl.float32), tile, tl.num_programs(0), out, is_out, out_channels, moments)


@triton.jit
def _pair_weights(
    weight,
    ky: tl.constexpr,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    in_room: tl.constexpr,
):
    """Weights that lead from a cell of y' and its neighbour to an even column and the odd one after it."""
    number, output = tl.arange(0, room), tl.arange(0, in_room)
    is_neighbour, out = number // out_channels, number % out_channels
    is_odd, channel = output // in_channels, output % in_channels
    kx = 1 + is_odd[None, :] * (1 - 2 * is_neighbour[:, None])
    is_weight = (is_neighbour < 2)[:, None] & (is_odd < 2)[None, :] & (is_neighbour[:, None] <= is_odd[None, :])
    place = ((out[:, None] * 3 + ky) * 3 + kx) * in_channels + channel[None, :]
    return tl.load(weight + place, mask=is_weight, other=0)


@triton.jit(do_not_specialize=_ANY)
def _map_gradient(
    of_y,
    weight,
    of_x,
    height,
    width,
    out_height,
    out_width,
    num_strips,
    strips_down,
    tiles_across,
    lines,
    halvings,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    in_room: tl.constexpr,
    rows: tl.constexpr,
    stages: tl.constexpr,
):
    """Gradient of the map at stride 2, in strips of `lines` lines of y', going down, of which each gives two.

    A row is a cell of y' and its neighbour to the right; a tile has 2^`halvings` rows of each of its strips.
    """
    tile = tl.program_id(0)
    number, place = tl.arange(0, room), tl.arange(0, in_room)
    image, top, column, is_strip = _strips_of(tile, num_strips, strips_down, tiles_across, lines, rows, halvings)
    end = tl.minimum(2 * tl.minimum(top + lines, out_height), height)
    is_strip = is_strip[:, None]
    inside = is_strip & (column[:, None] + (number // out_channels)[None, :] < out_width)
    inside = inside & (number < 2 * out_channels)[None, :]
    first = of_y + (image.to(tl.int64) * (out_height * out_width * out_channels) + column * out_channels)[:, None]
    first += number[None, :]
    pitch = out_width * out_channels
    is_output = is_strip & (2 * column[:, None] + (place // in_channels)[None, :] < width)
    is_output = is_output & (place < 2 * in_channels)[None, :]
    first_x = of_x + (image.to(tl.int64) * (height * width * in_channels) + 2 * column * in_channels)[:, None]
    first_x += place[None, :]
    pitch_x = width * in_channels
    upper = _pair_weights(weight, 0, in_channels, out_channels, room, in_room)
    middle = _pair_weights(weight, 1, in_channels, out_channels, room, in_room)
    lower = _pair_weights(weight, 2, in_channels, out_channels, room, in_room)
    values = _line(first, top, out_height, pitch, inside)
    even = tl.dot(values, middle, input_precision="ieee")
    odd = tl.dot(values, lower, input_precision="ieee")
    for turn in tl.range(0, lines, num_stages=stages):
        line = top + turn
        _stored(even, first_x, 2 * line, end, pitch_x, is_output)
        values = _line(first, line + 1, out_height, pitch, inside)
        odd = tl.dot(values, upper, odd, input_precision="ieee")
        _stored(odd, first_x, 2 * line + 1, end, pitch_x, is_output)
        even = tl.dot(values, middle, input_precision="ieee")
        odd = tl.dot(values, lower, input_precision="ieee")


@triton.jit(do_not_specialize=_ANY)
def _weight_gradient(
    x,
    of_y,
    parts,
    height,
    width,
    out_height,
    out_width,
    num_strips,
    strips_down,
    tiles_across,
    lines,
    halvings,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    stride: tl.constexpr,
    outputs: tl.constexpr,
    rows: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradient of the weights over the strips of a tile, each output of its rows being a part.

    Rows are those of the convolution. At stride 1 a line of x, loaded once, meets the three of y' that saw it; at
    stride 2 two lines of x meet the one of y' that saw both, and the second of them the next.
    parts: part, out, 3, 3, in.
    """
    tile = tl.program_id(0)
    number, place = tl.arange(0, room), tl.arange(0, out_room)
    image, top, column, is_strip = _strips_of(tile, num_strips, strips_down, tiles_across, lines, rows, halvings)
    left = column * outputs
    cell, output = number // in_channels, place // out_channels
    at = (left * stride - 1)[:, None] + cell[None, :]
    inside = is_strip[:, None] & (at >= 0) & (at < width) & (cell < _CELLS)[None, :]
    first = (left * stride - 1) * in_channels
    first = x + (image.to(tl.int64) * (height * width * in_channels) + first)[:, None] + number[None, :]
    pitch = width * in_channels
    is_output = is_strip[:, None] & (left[:, None] + output[None, :] < out_width) & (output < outputs)[None, :]
    first_y = left * out_channels
    first_y = of_y + (image.to(tl.int64) * (out_height * out_width * out_channels) + first_y)[:, None] + place[None, :]
    pitch_y = out_width * out_channels
    end = tl.minimum(top + lines, out_height)
    upper = tl.full((out_room, room), 0.0, tl.float32)
    middle = tl.full((out_room, room), 0.0, tl.float32)
    lower = tl.full((out_room, room), 0.0, tl.float32)
    for turn in tl.range(0, lines, num_stages=stages):
        line = top + turn
        if stride == 1:  # the strip's lines are those of x
            values = _line(first, line, end, pitch, inside)
            gradient = _line(first_y, line + 1, out_height, pitch_y, is_output)
            upper = tl.dot(tl.trans(gradient), values, upper, input_precision="ieee")
            gradient = _line(first_y, line, out_height, pitch_y, is_output)
            middle = tl.dot(tl.trans(gradient), values, middle, input_precision="ieee")
            gradient = _line(first_y, line - 1, out_height, pitch_y, is_output)
            lower = tl.dot(tl.trans(gradient), values, lower, input_precision="ieee")
        else:  # they are those of y'
            gradient = _line(first_y, line, end, pitch_y, is_output)
            values = _line(first, 2 * line, height, pitch, inside)
            middle = tl.dot(tl.trans(gradient), values, middle, input_precision="ieee")
            values = _line(first, tl.where(line < end, 2 * line + 1, height), height, pitch, inside)
            lower = tl.dot(tl.trans(gradient), values, lower, input_precision="ieee")
            gradient = _line(first_y, line + 1, out_height, pitch_y, is_output)
            upper = tl.dot(tl.trans(gradient), values, upper, input_precision="ieee")
    out, channel = place % out_channels, number % in_channels
    kx = cell[None, :] - output[:, None]
    is_weight = (kx >= 0) & (kx < 3) & (cell < _CELLS)[None, :] & (output < outputs)[:, None]
    place = parts + ((tile * outputs + output).to(tl.int64) * out_channels + out)[:, None] * (9 * in_channels)
    place += kx * in_channels + channel[None, :]
    tl.store(place, upper, mask=is_weight)
    tl.store(place + 3 * in_channels, middle, mask=is_weight)
    tl.store(place + 6 * in_channels, lower, mask=is_weight)
