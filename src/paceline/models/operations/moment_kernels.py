"""Moment kernels: mean, and sum of squares around it, of the parts of a map, by Triton.

A convolution of ours has its result in registers before it is stored, and a batch norm follows: what that has to know
is summed up here, of the numbers as they are stored, so that no pass over the map is needed for it. A part is what one
program has computed. The table of the moments is float32 and flat:

```
means    parts x channels
spreads  parts x channels     sums of squares around the means
counts   parts                cells of each
```
Where a program has all cells of its part at once, their mean is known before squares are summed, so that a large mean
costs no digits. Many parts are joined to few, by counts and means, before the norm's own kernel settles them
(`norm_kernels.py`); nothing depends on the order in which programs run. The module needs Triton; nothing imports it
before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LEAST_ROWS = tl.constexpr(16)
"""Of a product of matrices."""


@triton.jit
def _widened(value, ptx: tl.constexpr):
    """Return numbers as float32.

    Of bfloat16 by one instruction on NVIDIA's GPUs, two numbers from one register; left alone, the compiler rounds each
    of them for itself once more, by an instruction that takes eight times as long.
    """
    if ptx and value.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """{
            shl.b32 $0, $2, 16;
            and.b32 $1, $2, 0xffff0000;
            }""",
            "=r,=r,r",
            [value],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return value.to(tl.float32)


@triton.jit
def _note(value, is_row, count, part, num_parts, column, is_column, num_channels, moments):
    """Write the moments of the rows of a tile, of which there are `count`; the others are 0: rows x columns.

    The sums are a product with ones, of which every row is the same: exact, as the numbers are of half precision. It is
    also what lets each warp have columns of its own afterwards, so that squares are added without talk between warps.
    """
    ones = tl.full((_LEAST_ROWS, value.shape[0]), 1.0, tl.float32).to(value.dtype)
    mean = tl.sum(tl.dot(ones, value, input_precision="ieee"), axis=0) / (_LEAST_ROWS * count)
    away = value.to(tl.float32) - tl.where(is_row, 1.0, 0.0)[:, None] * mean[None, :]
    _write(mean, tl.sum(away * away, axis=0), part, num_parts, column, is_column, num_channels, moments)
    tl.store(moments + 2 * num_parts.to(tl.int64) * num_channels + part, count)


@triton.jit
def _write(mean, spread, part, num_parts, column, is_column, num_channels, moments):
    """Write the means and spreads of parts where they belong."""
    place = moments + part.to(tl.int64) * num_channels + column
    tl.store(place, mean, mask=is_column)
    tl.store(place + num_parts.to(tl.int64) * num_channels, spread, mask=is_column)


@triton.jit
def _joined(moments, first, part, num_parts, column, is_column, num_channels):
    """Count, mean and spread of these parts together, of which `first` is one that has cells."""
    is_part = part < num_parts
    inside = is_part[:, None] & is_column[None, :]
    place = moments + part.to(tl.int64)[:, None] * num_channels + column[None, :]
    means = tl.load(place, mask=inside, other=0)
    spreads = tl.load(place + num_parts.to(tl.int64) * num_channels, mask=inside, other=0)
    counts = tl.load(moments + 2 * num_parts.to(tl.int64) * num_channels + part, mask=is_part, other=0)
    total = tl.sum(counts)
    around = tl.load(moments + first.to(tl.int64) * num_channels + column, mask=is_column, other=0)
    mean = around + tl.sum(counts[:, None] * tl.where(inside, means - around[None, :], 0.0), axis=0) / total
    away = tl.where(inside, means - mean[None, :], 0.0)
    return total, mean, tl.sum(spreads + counts[:, None] * away * away, axis=0)


@triton.jit(do_not_specialize=("num_channels", "num_parts"))
def _join_moments(moments, joined, num_channels, num_parts, parts: tl.constexpr, channels: tl.constexpr):
    """Make one part of each `parts`."""
    chunk = tl.program_id(0)
    part = chunk * parts + tl.arange(0, parts)
    column = tl.program_id(1) * channels + tl.arange(0, channels)
    is_column = column < num_channels
    count, mean, spread = _joined(moments, chunk * parts, part, num_parts, column, is_column, num_channels)
    chunks = tl.num_programs(0)
    _write(mean, spread, chunk, chunks, column, is_column, num_channels, joined)
    tl.store(joined + 2 * chunks.to(tl.int64) * num_channels + chunk, count)
