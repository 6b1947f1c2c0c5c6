"""Bias kernels: sums over the cells of a gradient, which is the gradient of a bias, by Triton.

A gradient that is a piece of joined points lies evenly within each image alone; what computes the other gradients wants
it compact. So it may be copied on the way: what is read for the one is written for the other.

    sums      gradient -> sum of each part of the cells, compact gradient      reads gradient, may write it
    settle    parts -> sums                                                    small

Sums are float32, and nothing depends on the order in which programs run. `fused_bias.py` launches them. This module
needs Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("num_cells", "image_cells", "image_pitch", "part_cells"))
def _sums(
    gradient,
    compact,
    parts,
    num_cells,
    image_cells,
    num_channels,
    image_pitch,
    pitch,
    part_cells,
    copies: tl.constexpr,
    fits: tl.constexpr,
    cells: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
):
    """Sum the cells of each part, and may lay them side by side; pitches and channels are multiples of `step`.

    fits: whether the channels of a tile divide those that there are.
    """
    part = tl.program_id(0)
    first, last = part * part_cells, tl.minimum((part + 1) * part_cells, num_cells)
    channel = tl.program_id(1) * channels + tl.arange(0, channels)
    is_channel = channel < num_channels // step * step
    total = tl.full((cells, channels), 0.0, tl.float32)
    for start in range(first, last, cells):
        cell = start + tl.arange(0, cells)
        inside = (cell < last)[:, None]
        if not fits:
            inside = inside & is_channel[None, :]
        image = cell // image_cells
        place = image.to(tl.int64) * (image_pitch // step * step)
        place += (cell - image * image_cells).to(tl.int64) * (pitch // step * step)
        value = tl.load(gradient + (place[:, None] + channel[None, :]), mask=inside, other=0)
        if copies:
            place = cell.to(tl.int64) * (num_channels // step * step)
            tl.store(compact + (place[:, None] + channel[None, :]), value, mask=inside)
        total += value.to(tl.float32)
    tl.store(parts + part * num_channels + channel, tl.sum(total, axis=0), mask=is_channel)


@triton.jit(do_not_specialize=("num_parts",))
def _settle(parts, sums, num_channels, num_parts, parts_room: tl.constexpr, channels: tl.constexpr):
    """Add up the parts."""
    part = tl.arange(0, parts_room)
    channel = tl.program_id(0) * channels + tl.arange(0, channels)
    is_channel = channel < num_channels
    inside = (part < num_parts)[:, None] & is_channel[None, :]
    value = tl.load(parts + (part[:, None] * num_channels + channel[None, :]), mask=inside, other=0)
    tl.store(sums + channel, tl.sum(value, axis=0), mask=is_channel)
