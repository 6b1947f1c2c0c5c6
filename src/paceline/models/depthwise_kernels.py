"""Depthwise kernels: 3 x 3 convolutions in which each channel has a filter of its own, and their gradients, by Triton.

Little is computed per number, so all that counts is that each comes from memory once: a program works on a tile of
`lines` x `columns` cells of one image and some channels, and nine loads of the same tile, each moved by a cell, find
nearly all of it in the cache. The gradient of the map is the same convolution with the filters turned around. Sums are
float32; those of the filters are kept per cell of the tile until a part of the tiles is through, and parts are added by
`narrow_kernels`, in one order. `depthwise_conv.py` launches them. This module needs Triton; nothing imports it before
that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.narrow_kernels import _cells


@triton.jit
def _moved(values, image, line, column, channel, down: tl.constexpr, right: tl.constexpr, height, width, num_channels):
    """Load cells so far below and to the right of others, 0 beyond the edges: cells x channels, float32."""
    at_line, at_column = line + down, column + right
    inside = (at_line >= 0) & (at_line < height) & (at_column >= 0) & (at_column < width)
    inside = inside[:, None] & (channel < num_channels)[None, :]
    first = values + image.to(tl.int64) * (height * width * num_channels) + (down * width + right) * num_channels
    place = ((line * width + column) * num_channels)[:, None] + channel[None, :]  # within an image 32 bits will do
    return tl.load(first + place, mask=inside, other=0).to(tl.float32)


@triton.jit
def _convolve_each(
    x,
    filters,
    y,
    height,
    width,
    tiles_down,
    tiles_across,
    num_channels,
    turned: tl.constexpr,
    lines: tl.constexpr,
    columns: tl.constexpr,
    channels: tl.constexpr,
):
    """Convolve a tile; `turned` takes the filters, 9 x channel, from their other end, for the gradient of the map."""
    image, line, column = _cells(tl.program_id(0), tiles_down, tiles_across, lines, columns)
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    total = tl.full((lines * columns, channels), 0.0, tl.float32)
    for ky in tl.static_range(3):
        for kx in tl.static_range(3):
            value = _moved(x, image, line, column, channel, ky - 1, kx - 1, height, width, num_channels)
            place = (8 - 3 * ky - kx if turned else 3 * ky + kx) * num_channels + channel
            factor = tl.load(filters + place, mask=channel < num_channels, other=0).to(tl.float32)
            total += value * factor[None, :]
    inside = ((line < height) & (column < width))[:, None] & (channel < num_channels)[None, :]
    place = ((line * width + column) * num_channels)[:, None] + channel[None, :]
    first = y + image.to(tl.int64) * (height * width * num_channels)
    tl.store(first + place, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _filter_gradient(
    x,
    of_y,
    parts,
    height,
    width,
    tiles_down,
    tiles_across,
    num_channels,
    num_tiles,
    part_tiles,
    lines: tl.constexpr,
    columns: tl.constexpr,
    channels: tl.constexpr,
):
    """Sum the gradient of the filters over the tiles of one part; parts: part, channel, 9."""
    part = tl.program_id(0)
    first, last = part * part_tiles, tl.minimum((part + 1) * part_tiles, num_tiles)
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    zero = tl.full((lines * columns, channels), 0.0, tl.float32)
    of_0, of_1, of_2, of_3, of_4, of_5, of_6, of_7, of_8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    for tile in range(first, last):
        image, line, column = _cells(tile, tiles_down, tiles_across, lines, columns)
        gradient = _moved(of_y, image, line, column, channel, 0, 0, height, width, num_channels)
        of_0 += gradient * _moved(x, image, line, column, channel, -1, -1, height, width, num_channels)
        of_1 += gradient * _moved(x, image, line, column, channel, -1, 0, height, width, num_channels)
        of_2 += gradient * _moved(x, image, line, column, channel, -1, 1, height, width, num_channels)
        of_3 += gradient * _moved(x, image, line, column, channel, 0, -1, height, width, num_channels)
        of_4 += gradient * _moved(x, image, line, column, channel, 0, 0, height, width, num_channels)
        of_5 += gradient * _moved(x, image, line, column, channel, 0, 1, height, width, num_channels)
        of_6 += gradient * _moved(x, image, line, column, channel, 1, -1, height, width, num_channels)
        of_7 += gradient * _moved(x, image, line, column, channel, 1, 0, height, width, num_channels)
        of_8 += gradient * _moved(x, image, line, column, channel, 1, 1, height, width, num_channels)
    place, inside = parts + (part * num_channels + channel) * 9, channel < num_channels
    tl.store(place, tl.sum(of_0, axis=0), mask=inside)
    tl.store(place + 1, tl.sum(of_1, axis=0), mask=inside)
    tl.store(place + 2, tl.sum(of_2, axis=0), mask=inside)
    tl.store(place + 3, tl.sum(of_3, axis=0), mask=inside)
    tl.store(place + 4, tl.sum(of_4, axis=0), mask=inside)
    tl.store(place + 5, tl.sum(of_5, axis=0), mask=inside)
    tl.store(place + 6, tl.sum(of_6, axis=0), mask=inside)
    tl.store(place + 7, tl.sum(of_7, axis=0), mask=inside)
    tl.store(place + 8, tl.sum(of_8, axis=0), mask=inside)
