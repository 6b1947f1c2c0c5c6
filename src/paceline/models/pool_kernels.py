"""Pool kernels: maxima of 5x5 cells around each cell of a channels-last map, and their gradient, by Triton.

The map is not padded: a window holds what there is of it. Which of its cells is the maximum is one byte, 5 x row +
column in the window, and is torch's choice: of equal values the first, row by row; of NaNs, which are above all, the
last. That choice is the same if each row of the window chooses first and the rows are compared then, so a program walks
down a strip of columns and keeps the choices of five rows:

```
              strip of cells                     window of a cell at row 2
    row 0     o o o o o o o o  -> value, column  \
    row 1     o o o o o o o o  -> value, column   |
    row 2     o o o o o o o o  -> value, column   > value, place
    row 3     o o o o o o o o  -> value, column   |
    row 4     o o o o o o o o  -> value, column  /
    row 5     o o o o o o o o  -> value, column     takes the place of row 0, for a cell at row 3
```

The gradient walks in the same way over rows of windows and keeps the sums of five rows of cells, in float32; a cell
adds up its windows row by row, whatever the tiles are. Strips of neighbouring images lie side by side: no lane idles at
the edges of maps. `fused_pool.py` launches them. This module needs Triton; nothing imports it before that is known to
work.
"""

from __future__ import annotations

import triton
import triton.language as tl

_EIGHT = tl.constexpr(8)
"""Channels that are loaded at once; divides those of a map and all pitches."""


@triton.jit
def _strip(num_strips, height, width, rows: tl.constexpr, cells: tl.constexpr, channels: tl.constexpr):
    """Which columns of which images a program works on: whether there are such, first row, column, cell, channels."""
    strip = tl.program_id(0) * cells + tl.arange(0, cells)
    image = strip // width
    column = strip - image * width
    first = image.to(tl.int64) * height * width + column
    start = tl.program_id(1) * rows + tl.zeros((cells,), tl.int32)
    return strip < num_strips, start, column, first, tl.program_id(2) * channels + tl.arange(0, channels)


@triton.jit
def _places(cell, channel, pitch):
    """Where the channels of cells lie; the compiler is told that cells begin at multiples of eight."""
    return cell[:, None] * (pitch // _EIGHT * _EIGHT) + channel[None, :]


@triton.jit
def _better(best, chosen, value, place):
    """Keep the former unless the value is higher, or not a number."""
    better = (value > best) | (value != value)
    return tl.where(better, value, best), tl.where(better, place, chosen)


@triton.jit
def _best_of_row(x, pitch, row, is_there, column, first, channel, height, width):
    """Maximum of the five cells around each cell of a row, and which of them it is."""
    is_row = is_there & (row >= 0) & (row < height)
    best = tl.full((column.shape[0], channel.shape[0]), float("-inf"), tl.float32)
    chosen = tl.zeros((column.shape[0], channel.shape[0]), tl.int32) + tl.maximum(2 - column, 0)[:, None]
    for step in tl.static_range(5):
        near = column + (step - 2)
        inside = is_row & (near >= 0) & (near < width)
        place = _places(first + (row * width + (step - 2)), channel, pitch)
        value = tl.load(x + place, mask=inside[:, None], other=float("-inf")).to(tl.float32)
        best, chosen = _better(best, chosen, value, step)
    return best, chosen


@triton.jit(do_not_specialize=("num_strips", "height", "width"))
def _pool(
    x,
    copied,
    pooled,
    places,
    x_pitch,
    pooled_pitch,
    num_strips,
    height,
    width,
    num_channels,
    copies: tl.constexpr,
    rows: tl.constexpr,
    cells: tl.constexpr,
    channels: tl.constexpr,
    unroll: tl.constexpr,
):
    """Pool, and write down what was chosen; may copy the map on the way, to cells as far apart as those of `pooled`."""
    is_there, start, column, first, channel = _strip(num_strips, height, width, rows, cells, channels)
    v1, p1 = _best_of_row(x, x_pitch, start - 2, is_there, column, first, channel, height, width)
    v2, p2 = _best_of_row(x, x_pitch, start - 1, is_there, column, first, channel, height, width)
    v3, p3 = _best_of_row(x, x_pitch, start, is_there, column, first, channel, height, width)
    v4, p4 = _best_of_row(x, x_pitch, start + 1, is_there, column, first, channel, height, width)
    for number in tl.range(0, rows, loop_unroll_factor=unroll):
        row = start + number
        v0, p0, v1, p1, v2, p2, v3, p3 = v1, p1, v2, p2, v3, p3, v4, p4
        v4, p4 = _best_of_row(x, x_pitch, row + 2, is_there, column, first, channel, height, width)
        nothing = tl.full((cells, channels), float("-inf"), tl.float32)
        at_first = 5 * tl.maximum(2 - row, 0) + tl.maximum(2 - column, 0)
        chosen = tl.zeros((cells, channels), tl.int32) + at_first[:, None]
        best, chosen = _better(nothing, chosen, v0, p0)
        best, chosen = _better(best, chosen, v1, p1 + 5)
        best, chosen = _better(best, chosen, v2, p2 + 10)
        best, chosen = _better(best, chosen, v3, p3 + 15)
        best, chosen = _better(best, chosen, v4, p4 + 20)
        inside = (is_there & (row < height))[:, None]
        cell = first + row * width
        place = _places(cell, channel, pooled_pitch)
        tl.store(pooled + place, best.to(pooled.dtype.element_ty), mask=inside)
        tl.store(places + _places(cell, channel, num_channels), chosen.to(tl.uint8), mask=inside)
        if copies:
            tl.store(copied + place, tl.load(x + _places(cell, channel, x_pitch), mask=inside), mask=inside)


@triton.jit(do_not_specialize=("num_strips", "height", "width"))
def _pool_gradient(
    of_pooled,
    of_beside,
    places,
    of_x,
    pooled_pitch,
    beside_pitch,
    num_strips,
    height,
    width,
    num_channels,
    rows: tl.constexpr,
    cells: tl.constexpr,
    channels: tl.constexpr,
    unroll: tl.constexpr,
):
    """Gradient of what was pooled, from that of the maxima, and from that of what else was done with it."""
    is_there, start, column, first, channel = _strip(num_strips, height, width, rows, cells, channels)
    nothing = tl.full((cells, channels), 0.0, tl.float32)
    s0, s1, s2, s3, s4 = nothing, nothing, nothing, nothing, nothing
    for number in tl.range(0, rows + 4, loop_unroll_factor=unroll):
        row = start + (number - 2)  # of windows, which reach from cells two rows above to two below
        is_row = is_there & (row >= 0) & (row < height)
        for step in tl.static_range(5):
            near = column + (step - 2)
            inside = (is_row & (near >= 0) & (near < width))[:, None]
            cell = first + (row * width + (step - 2))
            chosen = tl.load(places + _places(cell, channel, num_channels), mask=inside, other=255).to(tl.int32)
            slope = tl.load(of_pooled + _places(cell, channel, pooled_pitch), mask=inside, other=0).to(tl.float32)
            s0 = tl.where(chosen == 4 - step, s0 + slope, s0)
            s1 = tl.where(chosen == 9 - step, s1 + slope, s1)
            s2 = tl.where(chosen == 14 - step, s2 + slope, s2)
            s3 = tl.where(chosen == 19 - step, s3 + slope, s3)
            s4 = tl.where(chosen == 24 - step, s4 + slope, s4)
        done = row - 2
        inside = (is_there & (number >= 4) & (done < height))[:, None]
        cell = first + done * width
        beside = tl.load(of_beside + _places(cell, channel, beside_pitch), mask=inside, other=0).to(tl.float32)
        place = _places(cell, channel, num_channels)
        tl.store(of_x + place, (s0 + beside).to(of_x.dtype.element_ty), mask=inside)
        s0, s1, s2, s3, s4 = s1, s2, s3, s4, nothing
