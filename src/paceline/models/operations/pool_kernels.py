r"""Pool kernels: maxima of 5x5 cells around each cell of a channels-last map, and their gradient, by Triton.

The map is not padded: a window holds what there is of it. Which of its cells is the maximum is one byte, 5 x row +
column in the window, and is torch's choice: of equal values the first, row by row; of NaNs, which are above all, the
last. That choice is the same if each row of the window chooses first and rows are compared then, and if rows are
compared two by two. So a program walks down a strip of columns; each row takes part in five windows, in four of them as
one of a pair, which is compared once:

```
              strip of cells                     window of a cell at row 2
    row 0     o o o o o o o o  -> value, column  \ value, place  \
    row 1     o o o o o o o o  -> value, column  /                |
    row 2     o o o o o o o o  -> value, column  \ value, place   > value, place
    row 3     o o o o o o o o  -> value, column  /                |
    row 4     o o o o o o o o  -> value, column                   /
    row 5     o o o o o o o o  -> value, column     a cell at row 3 takes pairs 1, 2 and 3, 4
```
Seven comparisons for a window, of which each is a handful of instructions: those are what a pool takes, not memory. For
two numbers of half precision at once where a GPU can (`pairs`).

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
_BETTER = """{
    .reg .b32 higher, none, place;
    set.gt.u32.TYPE higher, $4, $2;
    set.nan.u32.TYPE none, $4, $4;
    or.b32 higher, higher, none;
    add.u32 place, $5, $6;
    lop3.b32 $0, $4, $2, higher, 0xE4;
    lop3.b32 $1, place, $3, higher, 0xE4;
}"""
"""Masks of 16 bits each, and by them one or the other."""
_BETTER_BFLOAT16 = tl.constexpr(_BETTER.replace("TYPE", "bf16x2"))
_BETTER_FLOAT16 = tl.constexpr(_BETTER.replace("TYPE", "f16x2"))


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
def _better(best, chosen, value, place, below: tl.constexpr, pairs: tl.constexpr):
    """Keep the former unless the value, of a place as seen from so many rows below, is higher or not a number.

    pairs: by six instructions for two numbers of half precision.
    """
    if pairs:
        best, chosen = tl.inline_asm_elementwise(
            _BETTER_BFLOAT16 if value.dtype == tl.bfloat16 else _BETTER_FLOAT16,
            "=&r,=r,r,r,r,r,r",
            [best, chosen, value, place, tl.full(place.shape, 5 * below, tl.int16)],
            dtype=(value.dtype, tl.int16),
            is_pure=True,
            pack=2,
        )
    else:
        better = (value > best) | (value != value)
        best, chosen = tl.where(better, value, best), tl.where(better, place + 5 * below, chosen)
    return best, chosen


@triton.jit
def _best_of_row(x, pitch, row, is_there, column, first, channel, height, width, pairs: tl.constexpr):
    """Maximum of the five cells around each cell of a row, and which of them it is.

    Of a row above the map the place is, seen from there, that of the first cell of the window that there is: what is
    chosen where nothing is above minus infinity.
    """
    is_row = is_there & (row >= 0) & (row < height)
    here = x + _places(first + row * width, channel, pitch)
    begin = tl.maximum(2 - column, 0) + 5 * tl.maximum(-row, 0)
    chosen = tl.zeros((column.shape[0], channel.shape[0]), tl.int32) + begin[:, None]
    if pairs:
        chosen = chosen.to(tl.int16)
    for step in tl.static_range(5):
        near = column + (step - 2)
        inside = is_row & (near >= 0) & (near < width)
        value = tl.load(here + (step - 2) * (pitch // _EIGHT * _EIGHT), mask=inside[:, None], other=float("-inf"))
        if not pairs:
            value = value.to(tl.float32)
        if step == 0:
            best = value
        else:
            best, chosen = _better(best, chosen, value, tl.full(chosen.shape, step, chosen.dtype), 0, pairs)
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
    pairs: tl.constexpr,
    rows: tl.constexpr,
    cells: tl.constexpr,
    channels: tl.constexpr,
):
    """Pool, and write down what was chosen; may copy the map on the way, to cells as far apart as those of `pooled`."""
    is_there, start, column, first, channel = _strip(num_strips, height, width, rows, cells, channels)
    v0, p0 = _best_of_row(x, x_pitch, start - 2, is_there, column, first, channel, height, width, pairs)
    v1, p1 = _best_of_row(x, x_pitch, start - 1, is_there, column, first, channel, height, width, pairs)
    v2, p2 = _best_of_row(x, x_pitch, start, is_there, column, first, channel, height, width, pairs)
    v3, p3 = _best_of_row(x, x_pitch, start + 1, is_there, column, first, channel, height, width, pairs)
    v0, p0 = _better(v0, p0, v1, p1, 1, pairs)  # of rows -2 and -1, as seen from the former; and so on
    v1, p1 = _better(v1, p1, v2, p2, 1, pairs)
    v2, p2 = _better(v2, p2, v3, p3, 1, pairs)
    for number in tl.range(0, rows, loop_unroll_factor=rows if pairs else 1):
        row = start + number
        v4, p4 = _best_of_row(x, x_pitch, row + 2, is_there, column, first, channel, height, width, pairs)
        best, chosen = _better(v0, p0, v2, p2, 2, pairs)
        best, chosen = _better(best, chosen, v4, p4, 4, pairs)
        inside = (is_there & (row < height))[:, None]
        cell = first + row * width
        place = _places(cell, channel, pooled_pitch)
        tl.store(pooled + place, best.to(pooled.dtype.element_ty), mask=inside)
        tl.store(places + _places(cell, channel, num_channels), chosen.to(tl.uint8), mask=inside)
        if copies:
            tl.store(copied + place, tl.load(x + _places(cell, channel, x_pitch), mask=inside), mask=inside)
        v0, p0, v1, p1 = v1, p1, v2, p2
        v2, p2 = _better(v3, p3, v4, p4, 1, pairs)
        v3, p3 = v4, p4


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
):
    """Gradient of what was pooled, from that of the maxima, and from that of what else was done with it."""
    is_there, start, column, first, channel = _strip(num_strips, height, width, rows, cells, channels)
    nothing = tl.full((cells, channels), 0.0, tl.float32)
    s0, s1, s2, s3, s4 = nothing, nothing, nothing, nothing, nothing
    for number in tl.static_range(rows + 4):
        row = start + (number - 2)  # of windows, which reach from cells two rows above to two below
        is_row = is_there & (row >= 0) & (row < height)
        cell = first + row * width
        place, slopes = places + _places(cell, channel, num_channels), of_pooled + _places(cell, channel, pooled_pitch)
        for step in tl.static_range(5):
            near = column + (step - 2)
            inside = (is_row & (near >= 0) & (near < width))[:, None]
            chosen = tl.load(place + (step - 2) * (num_channels // _EIGHT * _EIGHT), mask=inside, other=255)
            slope = tl.load(slopes + (step - 2) * (pooled_pitch // _EIGHT * _EIGHT), mask=inside, other=0)
            chosen, slope = chosen.to(tl.int32), slope.to(tl.float32)
            if number >= 4:
                s0 = tl.where(chosen == 4 - step, s0 + slope, s0)
            if number >= 3 and number < rows + 3:
                s1 = tl.where(chosen == 9 - step, s1 + slope, s1)
            if number >= 2 and number < rows + 2:
                s2 = tl.where(chosen == 14 - step, s2 + slope, s2)
            if number >= 1 and number < rows + 1:
                s3 = tl.where(chosen == 19 - step, s3 + slope, s3)
            if number < rows:
                s4 = tl.where(chosen == 24 - step, s4 + slope, s4)
        if number >= 4:
            inside = (is_there & (row - 2 < height))[:, None]
            cell = first + (row - 2) * width
            beside = tl.load(of_beside + _places(cell, channel, beside_pitch), mask=inside, other=0).to(tl.float32)
            place = _places(cell, channel, num_channels)
            tl.store(of_x + place, (s0 + beside).to(of_x.dtype.element_ty), mask=inside)
        s0, s1, s2, s3, s4 = s1, s2, s3, s4, nothing
