"""Kernels of the sums of the loss and of their gradients, by Triton; `detection.py` states the law.

    _sum_boxes     (blocks of slots, images)   overlap and focal loss of the points that learn, and their weights
    _box_gradient  (blocks of slots, images)   of raw outputs, in their own type; rows of other points stay as they are
    _sum_classes   (blocks of logits)          binary cross-entropy of all logits
    _class_gradient  (blocks of logits)        of all logits, in their own type

Each program writes its own sum in float32, and adding those up is left to PyTorch: the same input gives the same bits.
This module needs Triton; nothing imports it before tensors on a GPU do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.losses.box_kernels import aspect_angle, ciou, ciou_slopes, four
from paceline.losses.detection import LAST_BIN_MARGIN

_MARGIN = tl.constexpr(LAST_BIN_MARGIN)


@triton.jit
def _slots_of_block(
    points, strides, boxes, owner, point, weight, num_points, num_boxes, num_slots, block: tl.constexpr
):
    """Look up slots of an image: which count, cell among all BA, weight, x, y, stride, sides of the ground truth."""
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
    share = tl.load(weight + here, mask=counts, other=0.0)
    return counts, image * num_points + place, share, x, y, stride, t_x1, t_y1, t_x2, t_y2


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


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _sum_boxes(
    raw,
    points,
    strides,
    boxes,
    predicted,
    owner,
    point,
    weight,
    sums,
    num_points,
    num_boxes,
    num_slots,
    bins: tl.constexpr,
    block: tl.constexpr,
):
    counts, cell, share, x, y, stride, t_x1, t_y1, t_x2, t_y2 = _slots_of_block(
        points, strides, boxes, owner, point, weight, num_points, num_boxes, num_slots, block
    )
    side = raw + cell * (4 * bins)
    focal = _focal(side, (x - t_x1) / stride, counts, bins)
    focal += _focal(side + bins, (y - t_y1) / stride, counts, bins)
    focal += _focal(side + 2 * bins, (t_x2 - x) / stride, counts, bins)
    focal += _focal(side + 3 * bins, (t_y2 - y) / stride, counts, bins)
    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    target_angle = aspect_angle(t_x2 - t_x1, t_y2 - t_y1)
    overlap = ciou(x1, y1, x2, y2, aspect_angle(x2 - x1, y2 - y1), t_x1, t_y1, t_x2, t_y2, target_angle)
    sums += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 3
    tl.store(sums, tl.sum(tl.where(counts, (1 - overlap) * share, 0.0), axis=0))
    tl.store(sums + 1, tl.sum(tl.where(counts, focal * share * 0.25, 0.0), axis=0))
    tl.store(sums + 2, tl.sum(share, axis=0))


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _box_gradient(
    raw,
    points,
    strides,
    boxes,
    predicted,
    owner,
    point,
    weight,
    of_box,
    of_focal,
    gradient,
    num_points,
    num_boxes,
    num_slots,
    bins: tl.constexpr,
    block: tl.constexpr,
):
    counts, cell, share, x, y, stride, t_x1, t_y1, t_x2, t_y2 = _slots_of_block(
        points, strides, boxes, owner, point, weight, num_points, num_boxes, num_slots, block
    )
    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    by_x1, by_y1, by_x2, by_y2 = ciou_slopes(x1, y1, x2, y2, t_x1, t_y1, t_x2, t_y2)
    further = tl.load(of_box) * share * stride  # a side that is further out lowers x1 and y1, and raises x2 and y2
    of_side = tl.load(of_focal) * share * 0.25
    side, out = raw + cell * (4 * bins), gradient + cell * (4 * bins)
    _store_side_gradient(side, out, (x - t_x1) / stride, counts, further * by_x1, of_side, bins)
    _store_side_gradient(side + bins, out + bins, (y - t_y1) / stride, counts, further * by_y1, of_side, bins)
    side, out = side + 2 * bins, out + 2 * bins
    _store_side_gradient(side, out, (t_x2 - x) / stride, counts, -further * by_x2, of_side, bins)
    _store_side_gradient(side + bins, out + bins, (t_y2 - y) / stride, counts, -further * by_y2, of_side, bins)


@triton.jit
def _log_of_one_more(share):
    """log(1 + share) for a share in [0, 1], to 1e-7 of itself: 2 atanh(share / (2 + share)), by a polynomial."""
    half = share / (2 + share)
    z = half * half
    series = 0.140788892 * z + 0.139825789
    series = series * z + 0.200122976
    series = series * z + 0.333331608
    series = series * z + 1.000000004
    return 2 * half * series


@triton.jit
def _logits_of_block(logits, label, weight, num_logits, num_classes: tl.constexpr, block: tl.constexpr):
    """Logits that lie side by side, their places, which of them there are, and the target of each."""
    start = tl.program_id(0).to(tl.int64) * block
    lane = tl.arange(0, block)
    real = start + lane < num_logits
    behind = (start % num_classes).to(tl.int32) + lane
    cell = start // num_classes + behind // num_classes
    learns = real & (tl.load(label + cell, mask=real, other=-1) == behind % num_classes)
    target = tl.load(weight + cell, mask=learns, other=0.0)
    return tl.load(logits + start + lane, mask=real, other=0.0).to(tl.float32), start + lane, real, target


@triton.jit
def _sum_classes(logits, label, weight, sums, num_logits, num_classes: tl.constexpr, block: tl.constexpr):
    x, _, real, target = _logits_of_block(logits, label, weight, num_logits, num_classes, block)
    softplus = tl.maximum(x, 0.0) + _log_of_one_more(tl.exp(-tl.abs(x)))
    tl.store(sums + tl.program_id(0), tl.sum(tl.where(real, softplus - target * x, 0.0), axis=0))


@triton.jit
def _class_gradient(
    logits,
    label,
    weight,
    of_sum,
    gradient,
    num_logits,
    num_classes: tl.constexpr,
    block: tl.constexpr,
):
    x, place, real, target = _logits_of_block(logits, label, weight, num_logits, num_classes, block)
    slope = tl.load(of_sum) * (tl.sigmoid(x) - target)
    tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=real)
