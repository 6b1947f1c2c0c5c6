"""Stem kernels: a 3x3 convolution of images with three colours, and the gradient of its weight, by Triton.

In a channels-last image the three pixels that a window sees of a line are nine numbers in a row. The windows of *four*
neighbouring outputs together see 27 (stride 2) or 18 (stride 1) of them, which lie inside of 32 numbers that begin at a
multiple of 16 bytes, each group's 24 (12) further than the last one's. So four outputs are one row of a matrix product:

```
32 numbers of a line   . . . . . a a a|a a a a a a . .|. . . . . . . .|. . . . . . . .     window of output 0
                       . . . . . . . .|. . . b b b b b|b b b b . . . .|. . . . . . . .               output 1
                       . . . . . . . .|. . . . . . . .|. c c c c c c c|c c . . . . . .               output 2
                       . . . . . . . .|. . . . . . . .|. . . . . . . d|d d d d d d d d               output 3

y    [groups, 4 x out]  =  sum over the 3 lines of   numbers [groups, 32]  x  bands [32, 4 x out]
y' x [4 x out, 32]      =  sum over groups of        y' [groups, 4 x out]^T  x  numbers [groups, 32]
```
*Bands* are the weights, once for each of the four outputs, where its window lies; zeros else. So 96 numbers are
multiplied per output where 27 would do, which tensor cores do while memory is waited for, and in turn eight numbers are
loaded and stored at once with one address, and no window is put together one number at a time.

```
forward    spread    weight -> bands                                small
           convolve  x bands -> y, and moments of its parts         reads x, writes y
backward   multiply  x y' -> gradient of the weight of each part    reads x, y'; or z', y
           settle    parts -> gradient of the weight                small
```
Where a norm of ours follows, y' is never written: it is computed from z', y and the norm's sums, as that would have,
and rounded to the same type, since tensor cores take no other.

Sums are float32; nothing depends on the order in which programs run. `fused_stem.py` launches them. This module needs
Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.models.operations.moment_kernels import _widened, _write
from paceline.models.operations.turn_kernels import _num_turns, _piece
from paceline.power_kernels import sigmoid

OUTPUTS = 4
"""Neighbours that are one group."""
NUMBERS = 32
"""Of a line, that a group looks at."""
_OUTPUTS = tl.constexpr(OUTPUTS)
_NUMBERS = tl.constexpr(NUMBERS)
_ANY = (
    "num_groups",
    "part_groups",
    "groups_across",
    "height",
    "line_numbers",
    "out_height",
    "out_width",
    "num_channels",
    "num_rows",
    "pitch",
)
"""Numbers for whose values nothing is compiled anew: images come in many sizes."""


@triton.jit
def _band(stride: tl.constexpr, channels: tl.constexpr):
    """Of the numbers of a line, by outputs and channels: which of the nine of its window each is, and whether it is."""
    number = tl.arange(0, _NUMBERS)
    output = tl.arange(0, _OUTPUTS * channels) // channels
    nth = number[:, None] - (4 * stride - 3) - 3 * stride * output[None, :]
    return nth, (nth >= 0) & (nth < 9)


@triton.jit
def _spread(
    weight,
    bands,
    of_channel,
    of_colour,
    of_line,
    of_pixel,
    stride: tl.constexpr,
    channels: tl.constexpr,
):
    """Write the weights of a block of channels and a line of the window where the windows of a group lie."""
    block, line = tl.program_id(0) // 3, tl.program_id(0) % 3
    column = tl.arange(0, _OUTPUTS * channels)
    nth, inside = _band(stride, channels)
    place = (block * channels + column % channels)[None, :] * of_channel
    place += line * of_line + (nth // 3) * of_pixel + (nth % 3) * of_colour
    value = tl.load(weight + place, mask=inside, other=0)
    place = (tl.program_id(0) * _NUMBERS + tl.arange(0, _NUMBERS))[:, None] * (_OUTPUTS * channels) + column[None, :]
    tl.store(bands + place, value.to(bands.dtype.element_ty))


@triton.jit
def _divided(number, by):
    """Quotient and remainder of what is not negative, for which division takes half of the instructions."""
    quotient = (number.to(tl.uint32) // by.to(tl.uint32)).to(tl.int32)
    return quotient, number - quotient * by


@triton.jit
def _numbers(
    x,
    is_group,
    image,
    across,
    top,
    height,
    line_numbers,
    stride: tl.constexpr,
    step: tl.constexpr,
):
    """Numbers of one line that groups look at, zeros outside of the image; lines begin at multiples of `step`."""
    line = image * height + top
    number = tl.arange(0, _NUMBERS) - 4 * stride
    first = across * (3 * stride * _OUTPUTS)
    inside = (first[:, None] + number[None, :] >= 0) & (first[:, None] + number[None, :] < line_numbers // step * step)
    inside &= (is_group & (top >= 0) & (top < height))[:, None]
    place = (line.to(tl.int64) * (line_numbers // step * step) + first)[:, None] + number[None, :]
    return tl.load(x + place, mask=inside, other=0)


@triton.jit
def _outputs(
    group,
    is_group,
    line,
    across,
    out_width,
    pitch,
    first_channel,
    channels: tl.constexpr,
    step: tl.constexpr,
    whole: tl.constexpr,
):
    """Where the outputs of groups lie, by output and channel, and which there are; all, where groups are whole."""
    column = tl.arange(0, _OUTPUTS * channels)
    output = (column // channels)[None, :]
    inside = is_group[:, None] & (output >= 0)
    if whole:
        first = group.to(tl.int64) * _OUTPUTS
    else:
        first = line.to(tl.int64) * out_width + across * _OUTPUTS
        inside &= (across * _OUTPUTS)[:, None] + output < out_width
    width = pitch // step * step
    place = (first * width)[:, None] + (output * width + (first_channel + column % channels)[None, :])
    return place, inside


@triton.jit
def _products(
    x,
    upper,
    middle,
    lower,
    group,
    is_group,
    groups_across,
    height,
    line_numbers,
    out_height,
    stride: tl.constexpr,
    step: tl.constexpr,
):
    """Convolve groups; give the outputs, float32, and where the groups lie: line of outputs, place within it."""
    line, across = _divided(group, groups_across)
    image, top = _divided(line, out_height)
    top = top * stride - 1
    seen = _numbers(x, is_group, image, across, top, height, line_numbers, stride, step)
    total = tl.dot(seen.to(upper.dtype), upper, input_precision="ieee")
    seen = _numbers(x, is_group, image, across, top + 1, height, line_numbers, stride, step)
    total = tl.dot(seen.to(upper.dtype), middle, total, input_precision="ieee")
    seen = _numbers(x, is_group, image, across, top + 2, height, line_numbers, stride, step)
    return tl.dot(seen.to(upper.dtype), lower, total, input_precision="ieee"), line, across


@triton.jit
def _num_outputs(first, last, output, groups_across, out_width):
    """How many of the groups from `first` to before `last` have this output: those that end a line may have fewer."""
    is_beyond = (groups_across - 1) * _OUTPUTS + output >= out_width
    return (last - first - tl.where(is_beyond, last // groups_across - first // groups_across, 0)).to(tl.float32)


@triton.jit(do_not_specialize=_ANY)
def _convolve(
    x,
    bands,
    y,
    moments,
    num_groups,
    part_groups,
    groups_across,
    height,
    line_numbers,
    out_height,
    out_width,
    num_channels,
    stride: tl.constexpr,
    notes: tl.constexpr,
    ptx: tl.constexpr,
    groups: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    whole: tl.constexpr,
    stages: tl.constexpr,
):
    """Convolve the groups of a part with the filters of a block of channels.

    notes: whether moments are written, those of each of the four outputs of the groups as a part of its own.
    """
    blocks = num_channels // channels
    part, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    first, last = part * part_groups, tl.minimum((part + 1) * part_groups, num_groups)
    size: tl.constexpr = _NUMBERS * _OUTPUTS * channels
    column = tl.arange(0, _OUTPUTS * channels)
    band = tl.arange(0, _NUMBERS)[:, None] * (_OUTPUTS * channels) + column[None, :]
    band += block * (3 * size)
    upper, middle, lower = tl.load(bands + band), tl.load(bands + band + size), tl.load(bands + band + 2 * size)
    if notes:  # what squares are summed around: the mean of what is computed first
        group = first + tl.arange(0, groups)
        total, line, across = _products(
            x, upper, middle, lower, group, group < last, groups_across, height, line_numbers, out_height, stride, step
        )
        _, inside = _outputs(
            group, group < last, line, across, out_width, num_channels, block * channels, channels, 8, whole
        )
        count = _num_outputs(first, tl.minimum(first + groups, last), column // channels, groups_across, out_width)
        around = tl.sum(tl.where(inside, total, 0.0), axis=0) / tl.maximum(count, 1.0)
        sums = tl.full((groups, _OUTPUTS * channels), 0.0, tl.float32)
        squares = tl.full((groups, _OUTPUTS * channels), 0.0, tl.float32)
    for start in tl.range(first, last, groups, num_stages=stages):
        group = start + tl.arange(0, groups)
        is_group = group < last
        total, line, across = _products(
            x, upper, middle, lower, group, is_group, groups_across, height, line_numbers, out_height, stride, step
        )
        place, inside = _outputs(
            group, is_group, line, across, out_width, num_channels, block * channels, channels, 8, whole
        )
        value = total.to(y.dtype.element_ty)
        tl.store(y + place, value, mask=inside)
        if notes:
            away = tl.where(inside, _widened(value, ptx) - around[None, :], 0.0)
            sums += away
            squares += away * away
    if notes:
        output, parts = column // channels, tl.num_programs(0) // blocks * _OUTPUTS
        count = _num_outputs(first, last, output, groups_across, out_width)
        away = tl.sum(sums, axis=0)
        mean = away / tl.maximum(count, 1.0)
        spread = tl.maximum(tl.sum(squares, axis=0) - away * mean, 0.0)
        channel, nth = block * channels + column % channels, part * _OUTPUTS + output
        _write(around + mean, spread, nth, parts, channel, channel < num_channels, num_channels, moments)
        tl.store(moments + 2 * parts.to(tl.int64) * num_channels + nth, count, mask=column % channels == 0)


@triton.jit
def _of_norm(channel, kept, weight, bias, of_affine, num_rows, num_channels):
    """Return what the gradient of a norm's input takes of channels: mean, slope, shift, rise and constant."""
    mean, scale = tl.load(kept + channel), tl.load(kept + num_channels + channel)
    slope = scale * tl.load(weight + channel).to(tl.float32)
    count = num_rows.to(tl.float32)
    constant = tl.load(of_affine + channel) / count * slope
    rise = tl.load(of_affine + num_channels + channel) / count * slope * scale
    return mean, slope, tl.load(bias + channel).to(tl.float32), rise, constant


@triton.jit
def _before_norm(gradient, centred, slope, shift, rise, constant, silu: tl.constexpr, ptx: tl.constexpr):
    """Gradient of a norm's input by that of the result, as `norm_kernels` computes it."""
    if silu:
        normed = centred * slope[None, :] + shift[None, :]
        share = sigmoid(normed, ptx)
        activated = normed * share
        gradient *= share + (activated - activated * share)
    return gradient * slope[None, :] - (centred * rise[None, :] + constant[None, :])


@triton.jit(do_not_specialize=_ANY)
def _multiply(
    x,
    of_y,
    y,
    kept,
    affine_weight,
    affine_bias,
    of_affine,
    parts,
    num_groups,
    groups_across,
    height,
    line_numbers,
    out_height,
    out_width,
    num_channels,
    pitch,
    num_rows,
    stride: tl.constexpr,
    normed: tl.constexpr,
    silu: tl.constexpr,
    ptx: tl.constexpr,
    groups: tl.constexpr,
    channels: tl.constexpr,
    step: tl.constexpr,
    of_y_step: tl.constexpr,
    whole: tl.constexpr,
    stages: tl.constexpr,
):
    """Multiply the gradient of the outputs of a part by what they see; a sum for each of the outputs of a group.

    normed: whether `of_y` is the gradient of what a norm has made of y, and an activation if `silu`.
    """
    blocks = num_channels // channels
    part, block, num_parts = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.num_programs(0) // blocks
    num_pieces = tl.cdiv(num_groups, groups)
    upper = tl.full((_OUTPUTS * channels, _NUMBERS), 0.0, tl.float32)
    middle = tl.full((_OUTPUTS * channels, _NUMBERS), 0.0, tl.float32)
    lower = tl.full((_OUTPUTS * channels, _NUMBERS), 0.0, tl.float32)
    if normed:
        channel = block * channels + tl.arange(0, _OUTPUTS * channels) % channels
        mean, slope, shift, rise, constant = _of_norm(
            channel, kept, affine_weight, affine_bias, of_affine, num_rows, num_channels
        )
    for turn in tl.range(0, _num_turns(part, num_parts, num_pieces), num_stages=stages):
        group = _piece(turn, part, num_parts) * groups + tl.arange(0, groups)
        is_group = group < num_groups
        line, across = _divided(group, groups_across)
        image, top = _divided(line, out_height)
        top = top * stride - 1
        place, inside = _outputs(
            group, is_group, line, across, out_width, pitch, block * channels, channels, of_y_step, whole
        )
        gradient = tl.load(of_y + place, mask=inside, other=0)
        if normed:
            place, _ = _outputs(
                group, is_group, line, across, out_width, num_channels, block * channels, channels, 8, whole
            )
            centred = _widened(tl.load(y + place, mask=inside, other=0), ptx) - mean[None, :]
            value = _before_norm(_widened(gradient, ptx), centred, slope, shift, rise, constant, silu, ptx)
            if not whole:  # outputs beyond an edge see some of the image; groups that are none see zeros
                value = tl.where(inside, value, 0.0)
            gradient = value.to(of_y.dtype.element_ty)
        gradient = tl.trans(gradient)
        seen = _numbers(x, is_group, image, across, top, height, line_numbers, stride, step)
        upper = tl.dot(gradient, seen.to(of_y.dtype.element_ty), upper, input_precision="ieee")
        seen = _numbers(x, is_group, image, across, top + 1, height, line_numbers, stride, step)
        middle = tl.dot(gradient, seen.to(of_y.dtype.element_ty), middle, input_precision="ieee")
        seen = _numbers(x, is_group, image, across, top + 2, height, line_numbers, stride, step)
        lower = tl.dot(gradient, seen.to(of_y.dtype.element_ty), lower, input_precision="ieee")
    nth, is_weight = _band(stride, channels)
    nth, is_weight = tl.trans(nth), tl.trans(is_weight)
    column = tl.arange(0, _OUTPUTS * channels)
    filters = (part * _OUTPUTS + column // channels) * num_channels + block * channels + column % channels
    weight = filters[:, None] * 27 + nth
    tl.store(parts + weight, upper, mask=is_weight)
    tl.store(parts + weight + 9, middle, mask=is_weight)
    tl.store(parts + weight + 18, lower, mask=is_weight)


@triton.jit(do_not_specialize=("num_rows",))
def _settle(
    parts,
    of_weight,
    num_rows,
    num_weights,
    of_channel,
    of_colour,
    of_line,
    of_pixel,
    rows: tl.constexpr,
    weights: tl.constexpr,
):
    """Add the sums of all parts and outputs of groups."""
    weight = tl.program_id(0) * weights + tl.arange(0, weights)
    is_weight = weight < num_weights
    total = tl.full((rows, weights), 0.0, tl.float32)
    for start in range(0, num_rows, rows):
        row = start + tl.arange(0, rows)
        inside = (row < num_rows)[:, None] & is_weight[None, :]
        total += tl.load(parts + row[:, None] * num_weights + weight[None, :], mask=inside, other=0)
    channel, line, pixel, colour = weight // 27, weight // 9 % 3, weight // 3 % 3, weight % 3
    place = channel * of_channel + line * of_line + pixel * of_pixel + colour * of_colour
    tl.store(of_weight + place, tl.sum(total, axis=0).to(of_weight.dtype.element_ty), mask=is_weight)
