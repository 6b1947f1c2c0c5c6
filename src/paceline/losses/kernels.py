"""Kernels: assignment and classification loss on a GPU, by Triton; `assign.py` and `detection.py` state the law.

    _search     (blocks of points, images)   decodes boxes; for every ground truth that a point lies in: alignment;
                                             best ground truth of every point
    _claim      (ground truths, images)      takes its points of the highest alignment; first and last claimant of each
    _contest    (blocks of slots, images)    owner and alignment of each claimed point; bests of each ground truth
    _target     (blocks of slots, images)    target score; what the point is to learn, once per slot, once per point
    _sum_classes, _class_gradient            binary cross-entropy of all logits, and its gradient in their own type

A slot is room for one claim: G x topk of them in an image, or one per point where that is less. A point claimed by
several ground truths counts in the slot of the first of them, whoever owns it.

No shape follows from the data, nothing waits for the device, and no sum is made by atomics, only minima and maxima: the
same input gives the same bits. This module needs Triton; nothing imports it before tensors on a GPU ask for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.boxes import EPS
from paceline.losses.assign import ALIGNMENT_EPS

_EPS, _ALIGNMENT_EPS = tl.constexpr(EPS), tl.constexpr(ALIGNMENT_EPS)
_EIGHTH_TURN, _ASPECT_GAIN = tl.constexpr(0.7853981633974483), tl.constexpr(0.4052847345693511)  # pi / 4, 4 / pi^2
_HUGE = tl.constexpr(float("inf"))


@triton.jit
def _angle(width, height):
    """atan(width / height) within 1.5e-7, as `aspect_angle`; a polynomial, for one law in compiler and interpreter."""
    width, height = tl.maximum(width, 0.0), tl.maximum(height, _EPS)
    turned = (width - height) / (width + height)  # in [-1, 1]: the tangent of the angle above an eighth of a turn
    z = turned * turned
    series = 0.0027662835 * z - 0.0157312490
    series = series * z + 0.0421376235
    series = series * z - 0.0745685481
    series = series * z + 0.1061837063
    series = series * z - 0.1419779779
    series = series * z + 0.1999187203
    series = series * z - 0.3333303671
    series = series * z + 0.9999999818
    return _EIGHTH_TURN + turned * series


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
def _four(place, shown):
    """Four numbers that lie side by side."""
    return (
        tl.load(place, mask=shown, other=0.0),
        tl.load(place + 1, mask=shown, other=0.0),
        tl.load(place + 2, mask=shown, other=0.0),
        tl.load(place + 3, mask=shown, other=0.0),
    )


@triton.jit
def _store_four(place, a, b, c, d, shown):
    tl.store(place, a, mask=shown)
    tl.store(place + 1, b, mask=shown)
    tl.store(place + 2, c, mask=shown)
    tl.store(place + 3, d, mask=shown)


@triton.jit
def _ciou(a_x1, a_y1, a_x2, a_y2, a_angle, b_x1, b_y1, b_x2, b_y2, b_angle):
    """Complete IoU, step by step as `ciou_of_sides`."""
    area_a = tl.maximum(a_x2 - a_x1, 0.0) * tl.maximum(a_y2 - a_y1, 0.0)
    area_b = tl.maximum(b_x2 - b_x1, 0.0) * tl.maximum(b_y2 - b_y1, 0.0)
    common_w = tl.maximum(tl.minimum(a_x2, b_x2) - tl.maximum(a_x1, b_x1), 0.0)
    common_h = tl.maximum(tl.minimum(a_y2, b_y2) - tl.maximum(a_y1, b_y1), 0.0)
    intersection = common_w * common_h
    iou = intersection / tl.maximum(area_a + area_b - intersection, _EPS)

    around_w = tl.maximum(a_x2, b_x2) - tl.minimum(a_x1, b_x1)
    around_h = tl.maximum(a_y2, b_y2) - tl.minimum(a_y1, b_y1)
    offset_x = (b_x1 + b_x2 - a_x1 - a_x2) * 0.5
    offset_y = (b_y1 + b_y2 - a_y1 - a_y2) * 0.5
    apart = offset_x * offset_x + offset_y * offset_y
    distance = apart / tl.maximum(around_w * around_w + around_h * around_h, _EPS)

    turn = b_angle - a_angle
    aspect = _ASPECT_GAIN * turn * turn
    alpha = aspect / tl.maximum(1 - iou + aspect, _EPS)
    return iou - distance - alpha * aspect


@triton.jit
def _alignment(logit, overlap):
    """score^0.5 x overlap^6."""
    cube = overlap * overlap * overlap
    return tl.sqrt(tl.sigmoid(logit)) * (cube * cube)


@triton.jit
def _mean_bin(place, shown, bins: tl.constexpr):
    """Mean of the distributions on 0..bins-1 whose logits begin at `place`."""
    bin = tl.arange(0, bins)
    logits = tl.load(place[:, None] + bin[None, :], mask=shown[:, None], other=0.0).to(tl.float32)
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.sum(odds * bin[None, :].to(tl.float32), axis=1) / tl.sum(odds, axis=1)


@triton.jit(do_not_specialize=["num_boxes"])
def _search(
    raw,
    logits,
    points,
    strides,
    boxes,
    labels,
    valid,
    predicted,
    alignment,
    best,
    first,
    last,
    label,
    weight,
    num_points,
    num_boxes,
    num_classes,
    least_side,
    bins: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    point = tl.program_id(0) * block + tl.arange(0, block)
    real = point < num_points
    cell = image * num_points + point
    x = tl.load(points + 2 * point, mask=real, other=0.0)
    y = tl.load(points + 2 * point + 1, mask=real, other=0.0)
    stride = tl.load(strides + point, mask=real, other=0.0)
    side = raw + cell * (4 * bins)
    x1 = x - _mean_bin(side, real, bins) * stride
    y1 = y - _mean_bin(side + bins, real, bins) * stride
    x2 = x + _mean_bin(side + 2 * bins, real, bins) * stride
    y2 = y + _mean_bin(side + 3 * bins, real, bins) * stride
    angle = _angle(x2 - x1, y2 - y1)
    _store_four(predicted + 4 * cell, x1, y1, x2, y2, real)

    best_overlap = tl.full((block,), 0.0, tl.float32)
    best_number = tl.full((block,), 0, tl.int32)
    for number in range(num_boxes):
        row = image * num_boxes + number
        if tl.load(valid + row) != 0:
            box = boxes + 4 * row
            box_x1, box_y1 = tl.load(box), tl.load(box + 1)
            box_x2, box_y2 = tl.load(box + 2), tl.load(box + 3)
            width, height = box_x2 - box_x1, box_y2 - box_y1
            centre_x, centre_y = (box_x1 + box_x2) * 0.5, (box_y1 + box_y2) * 0.5
            reach_x, reach_y = tl.maximum(width, least_side) * 0.5, tl.maximum(height, least_side) * 0.5
            inside = real & (x > centre_x - reach_x) & (x < centre_x + reach_x)
            inside &= (y > centre_y - reach_y) & (y < centre_y + reach_y)
            overlap = _ciou(box_x1, box_y1, box_x2, box_y2, _angle(width, height), x1, y1, x2, y2, angle)
            overlap = tl.where(inside, tl.maximum(overlap, 0.0), 0.0)
            own = tl.load(logits + cell * num_classes + tl.load(labels + row), mask=inside, other=0.0)
            tl.store(alignment + row * num_points + point, _alignment(own.to(tl.float32), overlap), mask=real)
            better = overlap > best_overlap
            best_overlap = tl.where(better, overlap, best_overlap)
            best_number = tl.where(better, number, best_number)
    tl.store(best + cell, best_number, mask=real)
    tl.store(first + cell, tl.zeros_like(best_number) + num_boxes, mask=real)
    tl.store(last + cell, tl.full((block,), -1, tl.int32), mask=real)
    tl.store(label + cell, tl.full((block,), -1, tl.int32), mask=real)
    tl.store(weight + cell, tl.full((block,), 0.0, tl.float32), mask=real)


@triton.jit(do_not_specialize=["num_boxes"])
def _claim(
    alignment,
    valid,
    picked,
    first,
    last,
    num_points,
    num_boxes,
    topk: tl.constexpr,
    block: tl.constexpr,
):
    number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = image * num_boxes + number
    values = alignment + row * num_points
    lane = tl.arange(0, block)
    # Each turn takes the highest value that comes after the one before: lower, or equal at a later point.
    value = tl.where(tl.load(valid + row) != 0, _HUGE, 0.0)
    point = tl.full((), -1, tl.int32)
    for turn in range(topk):
        if value > 0:
            high = tl.full((block,), 0.0, tl.float32)
            place = tl.full((block,), 0, tl.int32)
            for start in range(0, num_points, block):
                here = start + lane
                found = tl.load(values + here, mask=here < num_points, other=0.0)
                later = (found < value) | ((found == value) & (here > point))
                higher = later & (found > high)
                high = tl.where(higher, found, high)
                place = tl.where(higher, here, place)
            value = tl.max(high, axis=0)
            point = tl.min(tl.where(high == value, place, num_points), axis=0)
            if value > 0:
                tl.atomic_min(first + image * num_points + point, number)
                tl.atomic_max(last + image * num_points + point, number)
        tl.store(picked + row * topk + turn, tl.where(value > 0, point, -1))


@triton.jit
def _slot_point(picked, first, last, image, slot, real, num_slots, num_points, topk: tl.constexpr, every: tl.constexpr):
    """Point of each slot, and whether it counts: its point is claimed, and counts in no slot before."""
    if every:
        point = slot
        counts = real & (tl.load(last + image * num_points + slot, mask=real, other=-1) >= 0)
    else:
        point = tl.load(picked + image * num_slots + slot, mask=real, other=-1)
        counts = real & (point >= 0)
        counts &= tl.load(first + image * num_points + point, mask=counts, other=-1) == slot // topk
    return point, counts


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _contest(
    logits,
    boxes,
    labels,
    predicted,
    picked,
    best,
    first,
    last,
    owners,
    alignments,
    best_overlap,
    best_alignment,
    num_points,
    num_boxes,
    num_slots,
    num_classes,
    topk: tl.constexpr,
    every: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block + tl.arange(0, block)
    real = slot < num_slots
    point, counts = _slot_point(picked, first, last, image, slot, real, num_slots, num_points, topk, every)
    cell = image * num_points + point
    lowest = tl.load(first + cell, mask=counts, other=0)
    highest = tl.load(last + cell, mask=counts, other=0)
    owner = tl.where(lowest == highest, lowest, tl.load(best + cell, mask=counts, other=0))
    row = image * num_boxes + owner
    box_x1, box_y1, box_x2, box_y2 = _four(boxes + 4 * row, counts)
    x1, y1, x2, y2 = _four(predicted + 4 * cell, counts)
    box_angle, angle = _angle(box_x2 - box_x1, box_y2 - box_y1), _angle(x2 - x1, y2 - y1)
    overlap = tl.maximum(_ciou(box_x1, box_y1, box_x2, box_y2, box_angle, x1, y1, x2, y2, angle), 0.0)
    own = tl.load(logits + cell * num_classes + tl.load(labels + row, mask=counts, other=0), mask=counts, other=0.0)
    alignment = _alignment(own.to(tl.float32), overlap)
    tl.atomic_max(best_overlap + row, overlap, mask=counts)
    tl.atomic_max(best_alignment + row, alignment, mask=counts)
    tl.store(owners + image * num_slots + slot, tl.where(counts, owner, -1), mask=real)
    tl.store(alignments + image * num_slots + slot, alignment, mask=real)


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _target(
    points,
    strides,
    boxes,
    labels,
    picked,
    owners,
    alignments,
    best_overlap,
    best_alignment,
    label,
    weight,
    slot_cell,
    slot_weight,
    slot_box,
    slot_point,
    slot_stride,
    num_points,
    num_boxes,
    num_slots,
    every: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block + tl.arange(0, block)
    real = slot < num_slots
    here = image * num_slots + slot
    owner = tl.load(owners + here, mask=real, other=-1)
    counts = owner >= 0
    # A slot without a claim has weight 0 at some point of its own, so that gradients do not crowd at one.
    point = slot % num_points
    if not every:
        point = tl.where(counts, tl.load(picked + here, mask=counts, other=0), point)
    cell = image * num_points + point
    row = image * num_boxes + tl.maximum(owner, 0)
    overlap = tl.load(best_overlap + row, mask=counts, other=0.0)
    share = overlap / (tl.load(best_alignment + row, mask=counts, other=0.0) + _ALIGNMENT_EPS)
    score = tl.where(counts, tl.load(alignments + here, mask=counts, other=0.0) * share, 0.0)
    tl.store(weight + cell, score, mask=counts)
    tl.store(label + cell, tl.load(labels + row, mask=counts, other=0).to(tl.int32), mask=counts)

    x1, y1, x2, y2 = _four(boxes + 4 * row, counts)
    tl.store(slot_cell + here, cell, mask=real)
    tl.store(slot_weight + here, score, mask=real)
    _store_four(slot_box + 4 * here, x1, y1, x2, y2, real)
    tl.store(slot_point + 2 * here, tl.load(points + 2 * point, mask=real, other=0.0), mask=real)
    tl.store(slot_point + 2 * here + 1, tl.load(points + 2 * point + 1, mask=real, other=0.0), mask=real)
    tl.store(slot_stride + here, tl.load(strides + point, mask=real, other=1.0), mask=real)


@triton.jit
def _logits_of_block(logits, label, weight, num_logits, num_classes: tl.constexpr, block: tl.constexpr):
    """Some logits in a row, their places, which of them there are, and the target of each: the weight, or 0."""
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
    logits, label, weight, of_sum, gradient, num_logits, num_classes: tl.constexpr, block: tl.constexpr
):
    x, place, real, target = _logits_of_block(logits, label, weight, num_logits, num_classes, block)
    slope = tl.load(of_sum) * (tl.sigmoid(x) - target)
    tl.store(gradient + place, slope.to(gradient.dtype.element_ty), mask=real)
