"""Doubling kernels: a channels-last map at twice its height and width, and back, by Triton.

    double           each cell is written to four      reads x, writes four times as much
    halve            four cells are added up           reads four times what it writes

Sums are float32 and rounded once. `doubling.py` launches them. This module needs Triton; nothing imports it before
that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EIGHT = tl.constexpr(8)
"""Channels that are loaded at once; divides those of a map and all pitches."""


@triton.jit
def _places(cell, channel, pitch):
    """Where the channels of cells lie; the compiler is told that cells begin at multiples of eight."""
    return cell.to(tl.int64)[:, None] * (pitch // _EIGHT * _EIGHT) + channel[None, :]


@triton.jit
def _cells(num_cells, width, cells: tl.constexpr, channels: tl.constexpr):
    """Cells and channels of a program: whether there are such, cell, the first of its four in the doubled map."""
    cell = tl.program_id(0) * cells + tl.arange(0, cells)
    row = cell // width  # of all images
    first = 4 * row * width + 2 * (cell - row * width)
    return (cell < num_cells)[:, None], cell, first, tl.program_id(1) * channels + tl.arange(0, channels)


@triton.jit(do_not_specialize=("num_cells", "width"))
def _double(
    x,
    doubled,
    num_cells,
    width,
    num_channels,
    pitch,
    cells: tl.constexpr,
    channels: tl.constexpr,
):
    """Write each cell four times."""
    inside, cell, first, channel = _cells(num_cells, width, cells, channels)
    value = tl.load(x + _places(cell, channel, pitch), mask=inside, other=0)
    tl.store(doubled + _places(first, channel, num_channels), value, mask=inside)
    tl.store(doubled + _places(first + 1, channel, num_channels), value, mask=inside)
    tl.store(doubled + _places(first + 2 * width, channel, num_channels), value, mask=inside)
    tl.store(doubled + _places(first + 2 * width + 1, channel, num_channels), value, mask=inside)


@triton.jit(do_not_specialize=("num_cells", "width"))
def _halve(
    of_doubled,
    of_x,
    num_cells,
    width,
    num_channels,
    pitch,
    cells: tl.constexpr,
    channels: tl.constexpr,
):
    """Add up the four cells that each was written to, row by row."""
    inside, cell, first, channel = _cells(num_cells, width, cells, channels)
    total = tl.load(of_doubled + _places(first, channel, pitch), mask=inside, other=0).to(tl.float32)
    total += tl.load(of_doubled + _places(first + 1, channel, pitch), mask=inside, other=0).to(tl.float32)
    below = first + 2 * width
    total += tl.load(of_doubled + _places(below, channel, pitch), mask=inside, other=0).to(tl.float32)
    total += tl.load(of_doubled + _places(below + 1, channel, pitch), mask=inside, other=0).to(tl.float32)
    place = _places(cell, channel, num_channels)
    tl.store(of_x + place, total.to(of_x.dtype.element_ty), mask=inside)
