"""Depthwise kernel: the gradient of the map of a 3 x 3 convolution with a filter for each channel, by Triton.

It is the convolution of y' with the filters turned around. Little is computed per number, so all that counts is that
each comes from memory once: a program works on a tile of `lines` x `columns` cells of one image and some channels, and
nine loads of the same tile, each moved by a cell, find nearly all of it in the cache. Sums are float32.
`depthwise_conv.py` launches it. This module needs Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl


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
def _moved(values, image, line, column, channel, down: tl.constexpr, right: tl.constexpr, height, width, num_channels):
    """Load cells so far below and to the right of others, 0 beyond the edges: cells x channels, float32."""
    at_line, at_column = line + down, column + right
    inside = (at_line >= 0) & (at_line < height) & (at_column >= 0) & (at_column < width)
    inside = inside[:, None] & (channel < num_channels)[None, :]
    first = values + image.to(tl.int64) * (height * width * num_channels) + (down * width + right) * num_channels
    place = ((line * width + column) * num_channels)[:, None] + channel[None, :]  # within an image 32 bits will do
    return tl.load(first + place, mask=inside, other=0).to(tl.float32)


@triton.jit(do_not_specialize=("height", "width", "tiles_down", "tiles_across", "num_channels"))
def _trace_back(
    of_y,
    filters,
    of_x,
    height,
    width,
    tiles_down,
    tiles_across,
    num_channels,
    lines: tl.constexpr,
    columns: tl.constexpr,
    channels: tl.constexpr,
):
    """Convolve a tile by filters, 9 x channel, from their other end."""
    num_channels = num_channels // channels * channels  # and so of eight
    image, line, column = _cells(tl.program_id(0), tiles_down, tiles_across, lines, columns)
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    total = tl.full((lines * columns, channels), 0.0, tl.float32)
    for ky in tl.static_range(3):
        for kx in tl.static_range(3):
            value = _moved(of_y, image, line, column, channel, ky - 1, kx - 1, height, width, num_channels)
            place = (8 - 3 * ky - kx) * num_channels + channel
            factor = tl.load(filters + place, mask=channel < num_channels, other=0).to(tl.float32)
            total += value * factor[None, :]
    inside = ((line < height) & (column < width))[:, None] & (channel < num_channels)[None, :]
    place = ((line * width + column) * num_channels)[:, None] + channel[None, :]
    first = of_x + image.to(tl.int64) * (height * width * num_channels)
    tl.store(first + place, total.to(of_x.dtype.element_ty), mask=inside)
