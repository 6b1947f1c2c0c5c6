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

Where three times the channels would fill the power of two badly that a product is over, and leave no room for what is
loaded ahead, the convolution is nine products instead, one for each cell of the window.

A program works on a tile of `lines` x `columns` cells of one image, so that most of what it loads is loaded by it
already. Sums are float32; those of the weights are written by each program for itself and added afterwards, in one
order. `narrow_conv.py` launches them. This module needs Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.moment_kernels import _note
from paceline.models.turn_kernels import _num_turns, _piece

_ANY = ("height", "width", "out_height", "out_width", "tiles_down", "tiles_across")
"""Numbers for whose values nothing is compiled anew: images come in many sizes."""


@triton.jit
def _cells(tile, tiles_down, tiles_across, lines: tl.constexpr, columns: tl.constexpr):
    """Image, lines and columns of the cells of a tile."""
    image = tile // (tiles_down * tiles_across)
    within = tile - image * tiles_down * tiles_across
    cell = tl.arange(0, lines * columns)
    line = (within // tiles_across) * lines + cell // columns
    column = (within % tiles_across) * columns + cell % columns
    return image, line, column


@triton.jit
def _window_line(
    x,
    image,
    line,
    column,
    ky: tl.constexpr,
    height,
    width,
    in_channels: tl.constexpr,
    room: tl.constexpr,
    stride: tl.constexpr,
):
    """One line of the windows around cells: cells x room, of which 3 x `in_channels` count; 0 beyond the edges."""
    number = tl.arange(0, room)
    above, left = line * stride + (ky - 1), column * stride - 1
    at = left[:, None] + (number // in_channels)[None, :]
    inside = ((above >= 0) & (above < height))[:, None] & (at >= 0) & (at < width)
    inside = inside & (number < 3 * in_channels)[None, :]
    first = x + image.to(tl.int64) * (height * width * in_channels)
    place = ((above * width + left) * in_channels)[:, None] + number[None, :]  # within an image 32 bits will do
    return tl.load(first + place, mask=inside, other=0)


@triton.jit
def _window_cell(
    x,
    image,
    line,
    column,
    ky,
    kx,
    height,
    width,
    in_channels: tl.constexpr,
    room: tl.constexpr,
    stride: tl.constexpr,
):
    """One cell of the windows around cells: cells x room, of which `in_channels` count; 0 beyond the edges."""
    number = tl.arange(0, room)
    above, at = line * stride + (ky - 1), column * stride + (kx - 1)
    inside = ((above >= 0) & (above < height) & (at >= 0) & (at < width))[:, None]
    inside = inside & (number < in_channels)[None, :]
    first = x + image.to(tl.int64) * (height * width * in_channels)
    place = ((above * width + at) * in_channels)[:, None] + number[None, :]
    return tl.load(first + place, mask=inside, other=0)


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
    tiles_down,
    tiles_across,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    stride: tl.constexpr,
    by_lines: tl.constexpr,
    turned: tl.constexpr,
    notes: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
    stages: tl.constexpr,
):
    """Convolve a tile of cells; `turned` takes weights of a convolution from y to x, for the gradient of its map.

    weight: out, 3, 3, in; turned: in, 3, 3, out. by_lines: whether a product is over a line of the windows, and not
    over one of its cells. notes: whether the moments of the tile are written, as one part.
    """
    image, line, column = _cells(tl.program_id(0), tiles_down, tiles_across, lines, columns)
    number, out = tl.arange(0, room), tl.arange(0, out_room)
    total = tl.full((lines * columns, out_room), 0.0, tl.float32)
    if by_lines:
        is_weight = (number < 3 * in_channels)[:, None] & (out < out_channels)[None, :]
        for ky in tl.static_range(3):
            values = _window_line(x, image, line, column, ky, height, width, in_channels, room, stride)
            if turned:
                kx, channel = number // in_channels, number % in_channels
                place = ((channel * 3 + (2 - ky)) * 3 + (2 - kx)) * out_channels
                place = place[:, None] + out[None, :]
            else:
                place = (out * 9 * in_channels)[None, :] + (ky * 3 * in_channels + number)[:, None]
            factors = tl.load(weight + place, mask=is_weight, other=0)
            total = tl.dot(values, factors, total, input_precision="ieee")
    else:
        is_weight = (number < in_channels)[:, None] & (out < out_channels)[None, :]
        for nth in tl.range(9, num_stages=stages):
            values = _window_cell(x, image, line, column, nth // 3, nth % 3, height, width, in_channels, room, stride)
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
        tile, tiles = tl.program_id(0), tl.num_programs(0)
        down, across = tile // tiles_across % tiles_down, tile % tiles_across
        count = tl.minimum(lines, out_height - down * lines) * tl.minimum(columns, out_width - across * columns)
        count = count.to(tl.float32)
        _note(value, is_cell, count, tile, tiles, out, is_out, out_channels, moments)


@triton.jit
def _pairs(
    of_y,
    image,
    line,
    column,
    out_height,
    out_width,
    out_channels: tl.constexpr,
    room: tl.constexpr,
):
    """Cells of a line of y' and their neighbours to the right: cells x room; 0 beyond the edges."""
    number = tl.arange(0, room)
    at = column[:, None] + (number // out_channels)[None, :]
    inside = (line < out_height)[:, None] & (at < out_width) & (number < 2 * out_channels)[None, :]
    first = of_y + image.to(tl.int64) * (out_height * out_width * out_channels)
    place = ((line * out_width + column) * out_channels)[:, None] + number[None, :]
    return tl.load(first + place, mask=inside, other=0)


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
    tiles_down,
    tiles_across,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    in_room: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
):
    """Gradient of the map at stride 2: four cells of it for each cell of y', two in each of two lines."""
    image, line, column = _cells(tl.program_id(0), tiles_down, tiles_across, lines, columns)
    above = _pairs(of_y, image, line, column, out_height, out_width, out_channels, room)
    below = _pairs(of_y, image, line + 1, column, out_height, out_width, out_channels, room)
    middle = _pair_weights(weight, 1, in_channels, out_channels, room, in_room)
    even = tl.dot(above, middle, input_precision="ieee")
    lower = _pair_weights(weight, 2, in_channels, out_channels, room, in_room)
    upper = _pair_weights(weight, 0, in_channels, out_channels, room, in_room)
    odd = tl.dot(above, lower, input_precision="ieee")
    odd = tl.dot(below, upper, odd, input_precision="ieee")
    output = tl.arange(0, in_room)
    at = 2 * column[:, None] + (output // in_channels)[None, :]
    inside = (2 * line < height)[:, None] & (at < width) & (output < 2 * in_channels)[None, :]
    first = of_x + image.to(tl.int64) * (height * width * in_channels)
    place = first + ((2 * line * width + 2 * column) * in_channels)[:, None] + output[None, :]
    tl.store(place, even.to(of_x.dtype.element_ty), mask=inside)
    inside = inside & (2 * line + 1 < height)[:, None]
    tl.store(place + width * in_channels, odd.to(of_x.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=(*_ANY, "num_tiles"))
def _weight_gradient(
    x,
    of_y,
    parts,
    height,
    width,
    out_height,
    out_width,
    tiles_down,
    tiles_across,
    num_tiles,
    in_channels: tl.constexpr,
    out_channels: tl.constexpr,
    room: tl.constexpr,
    out_room: tl.constexpr,
    stride: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
    stages: tl.constexpr,
):
    """Sum the gradient of the weights over the tiles of one part; parts: part, out, 3, 3, in."""
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    number, out = tl.arange(0, room), tl.arange(0, out_room)
    upper = tl.full((out_room, room), 0.0, tl.float32)
    middle = tl.full((out_room, room), 0.0, tl.float32)
    lower = tl.full((out_room, room), 0.0, tl.float32)
    for turn in tl.range(0, _num_turns(part, num_parts, num_tiles), num_stages=stages):
        tile = _piece(turn, part, num_parts)
        image, line, column = _cells(tile, tiles_down, tiles_across, lines, columns)
        inside = ((line < out_height) & (column < out_width))[:, None] & (out < out_channels)[None, :]
        first_of_y = of_y + image.to(tl.int64) * (out_height * out_width * out_channels)
        place = ((line * out_width + column) * out_channels)[:, None] + out[None, :]
        gradient = tl.trans(tl.load(first_of_y + place, mask=inside, other=0))
        values = _window_line(x, image, line, column, 0, height, width, in_channels, room, stride)
        upper = tl.dot(gradient, values, upper, input_precision="ieee")
        values = _window_line(x, image, line, column, 1, height, width, in_channels, room, stride)
        middle = tl.dot(gradient, values, middle, input_precision="ieee")
        values = _window_line(x, image, line, column, 2, height, width, in_channels, room, stride)
        lower = tl.dot(gradient, values, lower, input_precision="ieee")
    is_weight = (out < out_channels)[:, None] & (number < 3 * in_channels)[None, :]
    place = parts + (part * out_channels + out)[:, None] * (9 * in_channels) + number[None, :]
    tl.store(place, upper, mask=is_weight)
    tl.store(place + 3 * in_channels, middle, mask=is_weight)
    tl.store(place + 6 * in_channels, lower, mask=is_weight)
