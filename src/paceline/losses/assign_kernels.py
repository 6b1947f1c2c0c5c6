"""Kernels of the assignment, by Triton; `assign.py` states the law.

    _search     (blocks of points, images)   decodes boxes; for every ground truth: alignment of each point inside;
                                             best ground truth of every point
    _claim      (ground truths, images)      takes its points of the highest alignment; first and last claimant of each
    _contest    (blocks of slots, images)    owner and alignment of each claimed point; bests of each ground truth
    _target     (blocks of slots, images)    target score; what the point is to learn, by slot and by point

A slot is room for one claim: G x topk of them in an image, or one per point where that is less. A point claimed by
several ground truths counts in the slot of the first of them, whoever owns it.

No shape follows from the data, nothing waits for the device, and nothing is summed by atomics, they only find minima
and maxima: the same input gives the same bits. This module needs Triton; nothing imports it before tensors on a GPU do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.losses.assign import ALIGNMENT_EPS
from paceline.losses.box_kernels import aspect_angle, ciou, four, store_four

_ALIGNMENT_EPS = tl.constexpr(ALIGNMENT_EPS)
_HUGE = tl.constexpr(float("inf"))


@triton.jit
def _alignment(logit, overlap):
    """score^0.5 x overlap^6."""
    cube = overlap * overlap * overlap
    return tl.sqrt(tl.sigmoid(logit)) * (cube * cube)


@triton.jit
def _mean_bin(place, shown, bins: tl.constexpr):
    """Mean of the distributions on 0..bins-1 whose logits begin at `place`."""
    number = tl.arange(0, bins)
    logits = tl.load(place[:, None] + number[None, :], mask=shown[:, None], other=0.0).to(tl.float32)
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return tl.sum(odds * number[None, :].to(tl.float32), axis=1) / tl.sum(odds, axis=1)


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
    angle = aspect_angle(x2 - x1, y2 - y1)
    store_four(predicted + 4 * cell, x1, y1, x2, y2, real)

    best_overlap = tl.full((block,), 0.0, tl.float32)
    best_number = tl.full((block,), 0, tl.int32)
    number = tl.full((), 0, tl.int32)
    while number < num_boxes:
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
            overlap = ciou(box_x1, box_y1, box_x2, box_y2, aspect_angle(width, height), x1, y1, x2, y2, angle)
            overlap = tl.where(inside, tl.maximum(overlap, 0.0), 0.0)
            own = tl.load(logits + cell * num_classes + tl.load(labels + row), mask=inside, other=0.0)
            tl.store(alignment + row * num_points + point, _alignment(own.to(tl.float32), overlap), mask=real)
            better = overlap > best_overlap
            best_overlap = tl.where(better, overlap, best_overlap)
            best_number = tl.where(better, number, best_number)
        number += 1
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
            start = tl.full((), 0, tl.int32)
            while start < num_points:
                here = start + lane
                found = tl.load(values + here, mask=here < num_points, other=0.0)
                later = (found < value) | ((found == value) & (here > point))
                higher = later & (found > high)
                high = tl.where(higher, found, high)
                place = tl.where(higher, here, place)
                start += block
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
    box_x1, box_y1, box_x2, box_y2 = four(boxes + 4 * row, counts)
    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    box_angle, angle = aspect_angle(box_x2 - box_x1, box_y2 - box_y1), aspect_angle(x2 - x1, y2 - y1)
    overlap = tl.maximum(ciou(box_x1, box_y1, box_x2, box_y2, box_angle, x1, y1, x2, y2, angle), 0.0)
    own = tl.load(logits + cell * num_classes + tl.load(labels + row, mask=counts, other=0), mask=counts, other=0.0)
    alignment = _alignment(own.to(tl.float32), overlap)
    tl.atomic_max(best_overlap + row, overlap, mask=counts)
    tl.atomic_max(best_alignment + row, alignment, mask=counts)
    tl.store(owners + image * num_slots + slot, tl.where(counts, owner, -1), mask=real)
    tl.store(alignments + image * num_slots + slot, alignment, mask=real)


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _target(
    labels,
    picked,
    alignments,
    best_overlap,
    best_alignment,
    label,
    weight,
    slot_owner,
    slot_point,
    slot_weight,
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
    owner = tl.load(slot_owner + here, mask=real, other=-1)
    counts = owner >= 0
    point = slot if every else tl.load(picked + here, mask=counts, other=-1)
    cell = image * num_points + point
    row = image * num_boxes + owner
    overlap = tl.load(best_overlap + row, mask=counts, other=0.0)
    share = overlap / (tl.load(best_alignment + row, mask=counts, other=0.0) + _ALIGNMENT_EPS)
    score = tl.load(alignments + here, mask=counts, other=0.0) * share
    tl.store(weight + cell, score, mask=counts)
    tl.store(label + cell, tl.load(labels + row, mask=counts, other=0).to(tl.int32), mask=counts)
    tl.store(slot_weight + here, tl.where(counts, score, 0.0), mask=real)
    tl.store(slot_point + here, tl.where(counts, point, -1), mask=real)
