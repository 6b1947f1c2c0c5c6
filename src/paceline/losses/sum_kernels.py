"""Kernels of the sums of the loss and of their gradients, by Triton; `detection.py` states the law.

    _sum_slots       (blocks of slots, images)   overlap and focal loss of the points that learn, their weights, and
                                                 the logits of their classes times these
    _sum_softplus    (blocks of logits)          cross-entropy of all logits as if no point learnt
    _add_up          (1)                         sums of all of these, weighed, and their total
    _fill_gradients  (blocks of both outputs)    as if no point learnt: 0 for raw outputs, a sigmoid for logits
    _slot_gradients  (blocks of slots, images)   of the points that learn, over those

The cross-entropy of a logit x with target t is softplus(x) - t x, its slope sigmoid(x) - t, and t is 0 but for one
class of some points. So the passes over all logits know nothing of targets; slots add what is different there.

Each program writes its own sum in float32, and one adds those up: the same input gives the same bits. Gradients have
the type of what they are the gradients of, and are rounded once. This module needs Triton; nothing imports it before
tensors on a GPU do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.losses.box_kernels import aspect_angle, ciou, ciou_slopes, four
from paceline.losses.detection import LAST_BIN_MARGIN
from paceline.power_kernels import falling, log_of_one_more, sigmoid

_COUNTS = ("num_points", "num_boxes", "num_slots", "num_classes")
"""For none of which a kernel of slots is compiled: that 16 divides them makes no other code."""
_MARGIN = tl.constexpr(LAST_BIN_MARGIN)


@triton.jit
def _slots_of_block(
    points, strides, boxes, labels, owner, point, weight, num_points, num_boxes, num_slots, block: tl.constexpr
):
    """Look up slots of an image: which count, cell among all BA, class, weight, x, y, stride, sides to learn."""
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block + tl.arange(0, block)
    here = image * num_slots + slot
    place = tl.load(point + here, mask=slot < num_slots, other=-1)
    counts = place >= 0
    row = image * num_boxes + tl.load(owner + here, mask=counts, other=0)
    t_x1, t_y1, t_x2, t_y2 = four(boxes + 4 * row, counts)
    x = tl.load(points + 2 * place, mask=counts, other=0.0)
    y = tl.load(points + 2 * place + 1, mask=counts, other=0.0)
    stride = tl.load(strides + place, mask=counts, other=1.0)
    label = tl.load(labels + row, mask=counts, other=0)
    share = tl.load(weight + here, mask=counts, other=0.0)
    return counts, image * num_points + place, label, share, x, y, stride, t_x1, t_y1, t_x2, t_y2


@triton.jit
def _bins_of_side(place, distance, counts, bins: tl.constexpr):
    """Logits of a side, their numbers, and the share of each bin in a distance in strides: a tent around it."""
    number = tl.arange(0, bins).to(tl.float32)[None, :]
    logits = tl.load(place[:, None] + tl.arange(0, bins)[None, :], mask=counts[:, None], other=0.0).to(tl.float32)
    within = tl.minimum(tl.maximum(distance, 0.0), bins - 1 - _MARGIN)
    return logits, number, tl.maximum(1 - tl.abs(number - within[:, None]), 0.0)


@triton.jit
def _focal(place, distance, counts, bins: tl.constexpr):
    """Cross-entropy of a side's distribution with the distance."""
    logits, _, tent = _bins_of_side(place, distance, counts, bins)
    most = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - most[:, None]), axis=1)
    return most + tl.log(total) - tl.sum(logits * tent, axis=1)


@triton.jit
def _store_side_gradient(place, gradient, distance, counts, of_mean, of_focal, bins: tl.constexpr):
    """Gradient of a side's logits, from those of its mean and of its cross-entropy."""
    logits, number, tent = _bins_of_side(place, distance, counts, bins)
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    share = odds / tl.sum(odds, axis=1)[:, None]
    mean = tl.sum(share * number, axis=1)
    slope = of_mean[:, None] * share * (number - mean[:, None]) + of_focal[:, None] * (share - tent)
    target = gradient[:, None] + tl.arange(0, bins)[None, :]
    tl.store(target, slope.to(gradient.dtype.element_ty), mask=counts[:, None])


@triton.jit(do_not_specialize=_COUNTS)
def _sum_slots(
    raw,
    logits,
    points,
    strides,
    boxes,
    labels,
    predicted,
    owner,
    point,
    weight,
    sums,
    num_points,
    num_boxes,
    num_slots,
    num_classes,
    bins: tl.constexpr,
    block: tl.constexpr,
):
    counts, cell, label, share, x, y, stride, t_x1, t_y1, t_x2, t_y2 = _slots_of_block(
        points, strides, boxes, labels, owner, point, weight, num_points, num_boxes, num_slots, block
    )
    side = raw + cell * (4 * bins)
    focal = _focal(side, (x - t_x1) / stride, counts, bins)
    focal += _focal(side + bins, (y - t_y1) / stride, counts, bins)
    focal += _focal(side + 2 * bins, (t_x2 - x) / stride, counts, bins)
    focal += _focal(side + 3 * bins, (t_y2 - y) / stride, counts, bins)
    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    target_angle = aspect_angle(t_x2 - t_x1, t_y2 - t_y1)
    overlap = ciou(x1, y1, x2, y2, aspect_angle(x2 - x1, y2 - y1), t_x1, t_y1, t_x2, t_y2, target_angle)
    own = tl.load(logits + cell * num_classes + label, mask=counts, other=0.0).to(tl.float32)
    sums += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(sums, tl.sum(tl.where(counts, (1 - overlap) * share, 0.0), axis=0))
    tl.store(sums + 1, tl.sum(own * share, axis=0))
    tl.store(sums + 2, tl.sum(tl.where(counts, focal * share * 0.25, 0.0), axis=0))
    tl.store(sums + 3, tl.sum(share, axis=0))


@triton.jit
def _sum_softplus(logits, sums, num_logits, steps: tl.constexpr, block: tl.constexpr, ptx: tl.constexpr):
    """softplus(x) is max(x, 0) + log(1 + e^-|x|), and a sum of logarithms is one of a product.

    Of the product of such 1 + e only what it has more than 1 is kept, since that may be tiny: its relative error is
    that of a sum of as many positive numbers as there are steps, at most 2^-23 for each, and it stays below 2^steps.
    """
    start = tl.program_id(0).to(tl.int64) * (steps * block)
    lane = tl.arange(0, block)
    linear, more = tl.full((block,), 0.0, tl.float32), tl.full((block,), 0.0, tl.float32)
    for step in tl.static_range(steps):
        here = step * block + lane
        x = tl.load(logits + start + here, mask=here < num_logits - start, other=-float("inf")).to(tl.float32)
        odds = falling(x, ptx)
        linear += tl.maximum(x, 0.0)
        more += tl.fma(more, odds, odds)
    tl.store(sums + tl.program_id(0), tl.sum(linear + log_of_one_more(more, ptx), axis=0))


@triton.jit
def _column_sum(table, column, num_rows, num_columns: tl.constexpr, block: tl.constexpr):
    """Sum of a column of a table, in an order that hangs on the number of rows alone."""
    total = tl.full((block,), 0.0, tl.float32)
    start = tl.full((), 0, tl.int32)
    while start < num_rows:
        row = start + tl.arange(0, block)
        total += tl.load(table + row * num_columns + column, mask=row < num_rows, other=0.0)
        start += block
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def _add_up(of_rows, of_blocks, found, box_gain, class_gain, focal_gain, num_rows, num_blocks, block: tl.constexpr):
    box = box_gain * _column_sum(of_rows, 0, num_rows, 4, block)
    learnt = _column_sum(of_rows, 1, num_rows, 4, block)
    focal = focal_gain * _column_sum(of_rows, 2, num_rows, 4, block)
    classes = class_gain * (_column_sum(of_blocks, 0, num_blocks, 1, block) - learnt)
    tl.store(found, box + classes + focal)
    tl.store(found + 1, box)
    tl.store(found + 2, classes)
    tl.store(found + 3, focal)
    tl.store(found + 4, _column_sum(of_rows, 3, num_rows, 4, block))


@triton.jit
def _fill_gradients(
    logits,
    of_classes,
    gain,
    of_raw,
    of_logits,
    num_raw,
    num_logits,
    steps: tl.constexpr,
    block: tl.constexpr,
    ptx: tl.constexpr,
):
    number, num_blocks = tl.program_id(0), tl.cdiv(num_logits, steps * block)
    lane = tl.arange(0, block)
    if number < num_blocks:
        start = number.to(tl.int64) * (steps * block)
        slope = gain * tl.load(of_classes)
        for step in tl.static_range(steps):
            here = step * block + lane
            shown = here < num_logits - start
            x = tl.load(logits + start + here, mask=shown, other=0.0).to(tl.float32)
            tl.store(of_logits + start + here, (slope * sigmoid(x, ptx)).to(of_logits.dtype.element_ty), mask=shown)
    else:
        start = (number - num_blocks).to(tl.int64) * (steps * block)
        zeros = tl.full((block,), 0.0, of_raw.dtype.element_ty)
        for step in tl.static_range(steps):
            here = step * block + lane
            tl.store(of_raw + start + here, zeros, mask=here < num_raw - start)


@triton.jit(do_not_specialize=_COUNTS)
def _slot_gradients(
    raw,
    logits,
    points,
    strides,
    boxes,
    labels,
    predicted,
    owner,
    point,
    weight,
    of_box,
    of_classes,
    of_focal,
    box_gain,
    class_gain,
    focal_gain,
    of_raw,
    of_logits,
    num_points,
    num_boxes,
    num_slots,
    num_classes,
    bins: tl.constexpr,
    block: tl.constexpr,
    ptx: tl.constexpr,
):
    counts, cell, label, share, x, y, stride, t_x1, t_y1, t_x2, t_y2 = _slots_of_block(
        points, strides, boxes, labels, owner, point, weight, num_points, num_boxes, num_slots, block
    )
    place = cell * num_classes + label
    own = tl.load(logits + place, mask=counts, other=0.0).to(tl.float32)
    slope = class_gain * tl.load(of_classes) * (sigmoid(own, ptx) - share)
    tl.store(of_logits + place, slope.to(of_logits.dtype.element_ty), mask=counts)

    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    by_x1, by_y1, by_x2, by_y2 = ciou_slopes(x1, y1, x2, y2, t_x1, t_y1, t_x2, t_y2)
    # A side that is further out lowers x1 and y1, and raises x2 and y2.
    further = box_gain * tl.load(of_box) * share * stride
    of_side = focal_gain * tl.load(of_focal) * share * 0.25
    side, out = raw + cell * (4 * bins), of_raw + cell * (4 * bins)
    _store_side_gradient(side, out, (x - t_x1) / stride, counts, further * by_x1, of_side, bins)
    _store_side_gradient(side + bins, out + bins, (y - t_y1) / stride, counts, further * by_y1, of_side, bins)
    side, out = side + 2 * bins, out + 2 * bins
    _store_side_gradient(side, out, (t_x2 - x) / stride, counts, -further * by_x2, of_side, bins)
    _store_side_gradient(side + bins, out + bins, (t_y2 - y) / stride, counts, -further * by_y2, of_side, bins)
