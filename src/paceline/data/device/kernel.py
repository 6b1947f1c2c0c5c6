"""Kernel: the pictures of a batch from its table in one launch, by Triton; `reference.py` states what it computes.

    grid: (blocks of a picture, pictures)        block: 8 rows x 64 columns of output pixels

    for each tile, in order:  skip it unless its rectangle meets the block
                              map the centres, sample 2 x 2 blocks of 2^halvings x 2^halvings source pixels, blend
    mix the layers, change the colours, write three channels side by side

Neighbouring lanes read neighbouring source pixels where nothing is turned; where it is, the rows of a block stay in the
L1 cache. Nothing is shared between programs. This module needs Triton; nothing imports it before it is asked to draw.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from paceline.data.device.reference import LUMA
from paceline.data.device.table import PictureFloat, PictureInt, TileFloat, TileInt
from paceline.data.render import FILL

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.data.device.pack import DeviceTable

_ROWS, _COLUMNS = 8, 64
_NUM_INT, _NUM_FLOAT = tl.constexpr(len(TileInt)), tl.constexpr(int(TileFloat.COUNT))
_NUM_PICTURE_INT, _NUM_PICTURE_FLOAT = tl.constexpr(int(PictureInt.COUNT)), tl.constexpr(len(PictureFloat))
_FILL = tl.constexpr(float(FILL))
_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)


def render_by_kernel(
    sources: Tensor,
    masks: Tensor,
    table: DeviceTable,
    size: int,
    dtype: torch.dtype,
    *,
    block: tuple[int, int] = (_ROWS, _COLUMNS),
) -> Tensor:
    """Draw B3HW in [0, 1], channels-last, from uint8 buffers of sources and masks, on the current stream.

    `block` counts the rows and columns of a program's pixels, powers of two; it changes the time only.
    """
    rows, columns = block
    num_pictures, num_tiles = table.starts.shape
    out = torch.empty((num_pictures, size, size, 3), dtype=dtype, device=sources.device)
    grid = (-(-size // rows) * -(-size // columns), num_pictures)
    _draw[grid](
        sources,
        masks,
        table.starts,
        table.mask_starts,
        table.tiles_int,
        table.tiles_float,
        table.pictures_int,
        table.pictures_float,
        out,
        size=size,
        num_tiles=num_tiles,
        rows=rows,
        columns=columns,
        num_warps=4,
    )
    return out.permute(0, 3, 1, 2)


@triton.jit
def _bilinear(buffer, start, above, below, left, right, across, down, pitch, planes, side, inside):
    """Weighted mean of four blocks of side x side pixels of one plane.

    `above`, `below` are bytes from the crop's start to the blocks' first rows, `left`, `right` along these.
    """
    total = tl.full(across.shape, 0.0, tl.float32)
    for line in range(side):
        for column in range(side):
            corner = buffer + start + line * pitch + column * planes
            upper_left = tl.load(corner + (above + left), mask=inside, other=0).to(tl.float32)
            upper_right = tl.load(corner + (above + right), mask=inside, other=0).to(tl.float32)
            lower_left = tl.load(corner + (below + left), mask=inside, other=0).to(tl.float32)
            lower_right = tl.load(corner + (below + right), mask=inside, other=0).to(tl.float32)
            upper = upper_left + across * (upper_right - upper_left)
            lower = lower_left + across * (lower_right - lower_left)
            total += upper + down * (lower - upper)
    return total / (side * side).to(tl.float32)


@triton.jit
def _ramp(place):
    """How far a channel lies below the brightest, as a share of the saturation; `place` in sixths of a turn."""
    place = place - 6 * tl.floor(place / 6)
    return tl.minimum(tl.maximum(tl.minimum(place, 4 - place), 0.0), 1.0)


@triton.jit
def _draw(
    sources,
    masks,
    starts,
    mask_starts,
    tiles_int,
    tiles_float,
    pictures_int,
    pictures_float,
    out,
    size: tl.constexpr,
    num_tiles: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    picture = tl.program_id(1)
    blocks_across: tl.constexpr = (size + columns - 1) // columns
    first_y = (tl.program_id(0) // blocks_across) * rows
    first_x = (tl.program_id(0) % blocks_across) * columns
    lane = tl.arange(0, rows * columns)
    x, y = first_x + lane % columns, first_y + lane // columns
    centre_x, centre_y = x.to(tl.float32) + 0.5, y.to(tl.float32) + 0.5

    integers = pictures_int + picture * _NUM_PICTURE_INT
    cut_left, cut_top = tl.load(integers + 4), tl.load(integers + 5)
    cut_right, cut_bottom = tl.load(integers + 6), tl.load(integers + 7)

    red = tl.full((rows * columns,), _FILL, tl.float32)
    green, blue = red, red
    red_1, green_1, blue_1 = red, red, red
    for tile in range(num_tiles):
        number = picture * num_tiles + tile
        integer = tiles_int + number * _NUM_INT
        left, top = tl.load(integer), tl.load(integer + 1)
        right, bottom = tl.load(integer + 2), tl.load(integer + 3)
        if (left < first_x + columns) & (right > first_x) & (top < first_y + rows) & (bottom > first_y):
            height, width = tl.load(integer + 4), tl.load(integer + 5)
            pitch, planes = tl.load(integer + 6), tl.load(integer + 7)
            side = 1 << tl.load(integer + 8)
            layer, yields, mask_pitch = tl.load(integer + 9), tl.load(integer + 10), tl.load(integer + 11)
            real = tiles_float + number * _NUM_FLOAT
            depth = tl.load(real + 6) * centre_x + tl.load(real + 7) * centre_y + tl.load(real + 8)
            u = (tl.load(real) * centre_x + tl.load(real + 1) * centre_y + tl.load(real + 2)) / depth
            v = (tl.load(real + 3) * centre_x + tl.load(real + 4) * centre_y + tl.load(real + 5)) / depth
            inside = (x >= left) & (x < right) & (y >= top) & (y < bottom) & (depth > 0)
            inside &= (u >= tl.load(real + 9)) & (u < tl.load(real + 11))
            inside &= (v >= tl.load(real + 10)) & (v < tl.load(real + 12))
            # A tile that does not yield has its cut end at 0, before the first pixel.
            inside &= (x < cut_left) | (x >= cut_right * yields) | (y < cut_top) | (y >= cut_bottom)
            u, v = tl.where(inside, u, 0.5) - 0.5, tl.where(inside, v, 0.5) - 0.5
            floor_u, floor_v = tl.floor(u), tl.floor(v)
            across, down = u - floor_u, v - floor_v
            x0 = tl.minimum(tl.maximum(floor_u.to(tl.int32), 0), width - 1) * side
            x1 = tl.minimum(tl.maximum(floor_u.to(tl.int32) + 1, 0), width - 1) * side
            y0 = tl.minimum(tl.maximum(floor_v.to(tl.int32), 0), height - 1) * side
            y1 = tl.minimum(tl.maximum(floor_v.to(tl.int32) + 1, 0), height - 1) * side
            opacity = inside.to(tl.float32)
            mask_start = tl.load(mask_starts + number)
            if mask_start >= 0:
                opacity *= _bilinear(
                    masks,
                    mask_start,
                    y0 * mask_pitch,
                    y1 * mask_pitch,
                    x0,
                    x1,
                    across,
                    down,
                    mask_pitch,
                    1,
                    side,
                    inside,
                )
                opacity /= 255
            start = tl.load(starts + number)
            above, below, x0, x1 = y0 * pitch, y1 * pitch, x0 * planes, x1 * planes
            new_red = _bilinear(sources, start, above, below, x0, x1, across, down, pitch, planes, side, inside)
            new_green, new_blue = new_red, new_red
            if planes == 3:
                new_green = _bilinear(
                    sources, start + 1, above, below, x0, x1, across, down, pitch, planes, side, inside
                )
                new_blue = _bilinear(
                    sources, start + 2, above, below, x0, x1, across, down, pitch, planes, side, inside
                )
            if layer == 0:
                red += opacity * (new_red - red)
                green += opacity * (new_green - green)
                blue += opacity * (new_blue - blue)
            else:
                red_1 += opacity * (new_red - red_1)
                green_1 += opacity * (new_green - green_1)
                blue_1 += opacity * (new_blue - blue_1)

    real = pictures_float + picture * _NUM_PICTURE_FLOAT
    hue, saturation, value, share = tl.load(real), tl.load(real + 1), tl.load(real + 2), tl.load(real + 3)
    red = red_1 + share * (red - red_1)
    green = green_1 + share * (green - green_1)
    blue = blue_1 + share * (blue - blue_1)

    most = tl.maximum(tl.maximum(red, green), blue)
    spread = most - tl.minimum(tl.minimum(red, green), blue)
    safe = tl.maximum(spread, 1e-6)
    sixths = tl.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe)
    sixths = tl.where(most == red, (green - blue) / safe, sixths) + hue
    strength = tl.minimum(spread / tl.maximum(most, 1e-6) * saturation, 1.0)
    bright = tl.minimum(most * value, 255.0)
    red = bright - bright * strength * _ramp(sixths + 5)
    green = bright - bright * strength * _ramp(sixths + 3)
    blue = bright - bright * strength * _ramp(sixths + 1)
    if tl.load(integers) != 0:
        luma = _RED * red + _GREEN * green + _BLUE * blue
        red, green, blue = luma, luma, luma

    inside = (x < size) & (y < size)
    place = out + (picture.to(tl.int64) * (size * size) + y * size + x) * 3
    for channel in tl.static_range(3):
        taken = tl.load(integers + 1 + channel)
        chosen = tl.where(taken == 0, red, tl.where(taken == 1, green, blue)) / 255
        tl.store(place + channel, chosen.to(out.dtype.element_ty), mask=inside)
