"""Kernels of the assignment, by Triton; `assign.py` states the law.

    _decode     (blocks of sides, images)           predicted boxes from their distributions; no claims yet
    _claim      (ground truths, images, pieces)     of a piece of the points inside its box, those of the highest
                                                    alignment; best ground truth of each point
    _pick       (blocks of ground truths, images)   joins the pieces; first and last claimant of each point
    _contest    (blocks of slots, images)           owner and alignment of each claimed point; bests of each owner
    _target     (blocks of slots, images)           target score, by slot

Points are the centres of cells, which lie row by row on each level; strides double from level to level. So the points
inside a box are a rectangle of cells on each level, and no others are looked at: a hundredth of all pairs.

A slot is room for one claim: G x topk of them in an image, or one per point where that is less. A point claimed by
several ground truths counts in the slot of the first of them, whoever owns it.

No shape follows from the data, nothing waits for the device, and nothing is summed by atomics, they only find minima
and maxima: the same input gives the same bits. A value above 0 and a number are compared as one integer of 64 bits, the
value in its upper half, the number taken from the highest one below, so that the first of equals is the largest.
This module needs Triton; nothing imports it before tensors on a GPU do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.losses.assign import ALIGNMENT_EPS
from paceline.losses.box_kernels import aspect_angle, ciou, four
from paceline.power_kernels import power_of_two, sigmoid

_COUNTS = ("num_points", "num_boxes")
"""For none of which a kernel is compiled: that 16 divides them makes no other code."""
_ALIGNMENT_EPS = tl.constexpr(ALIGNMENT_EPS)
_LOG2_E = tl.constexpr(1.4426950408889634)
_MOST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
_LAST = tl.constexpr(0x7FFFFFFF)
"""What numbers are turned around by in keys: all 31 bits, so that the lower number is the higher half."""


@triton.jit
def _alignment(logit, overlap, ptx: tl.constexpr):
    """score^0.5 x overlap^6."""
    cube = overlap * overlap * overlap
    return tl.sqrt(sigmoid(logit, ptx)) * (cube * cube)


@triton.jit
def _key(value, number):
    """Make one integer of a value and a number; 0 where the value is not above 0."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(value > 0, (bits << 32) | (number ^ _LAST).to(tl.int64), 0)


@triton.jit
def _number(key):
    """Return the number in a key."""
    return (key & _LAST).to(tl.int32) ^ _LAST


@triton.jit(do_not_specialize=_COUNTS)
def _decode(
    raw,
    points,
    strides,
    predicted,
    best,
    first,
    last,
    num_points,
    num_boxes,
    bins: tl.constexpr,
    block: tl.constexpr,
    ptx: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * block + tl.arange(0, block)
    real = row < 4 * num_points
    bin_ = tl.arange(0, bins)
    place = (image * (4 * num_points) + row)[:, None] * bins + bin_[None, :]
    logits = tl.load(raw + place, mask=real[:, None], other=0.0).to(tl.float32)
    scaled = tl.fma(logits, _LOG2_E, -_LOG2_E * tl.max(logits, axis=1)[:, None])
    odds = power_of_two(scaled, ptx)
    mean = tl.sum(odds * bin_[None, :].to(tl.float32), axis=1) / tl.sum(odds, axis=1)
    point, side = row // 4, row % 4
    centre = tl.load(points + 2 * point + side % 2, mask=real, other=0.0)
    reach = mean * tl.load(strides + point, mask=real, other=0.0)
    side = tl.where(side < 2, centre - reach, centre + reach)
    tl.store(predicted + image * (4 * num_points) + row, side, mask=real)

    point = tl.program_id(0) * (block // 4) + tl.arange(0, block // 4)
    real = point < num_points
    cell = image * num_points + point
    tl.store(best + cell, tl.full((block // 4,), 0, tl.int64), mask=real)
    tl.store(first + cell, tl.zeros_like(point) + num_boxes, mask=real)
    tl.store(last + cell, tl.full((block // 4,), -1, tl.int32), mask=real)


@triton.jit
def _cells_between(low, high, stride, count):
    """First of `count` cells in a row whose centre lies between two places, and how many do; rather one more."""
    first = tl.minimum(tl.maximum(tl.floor(low / stride - 0.51) + 1, 0.0), count * 1.0)
    end = tl.minimum(tl.maximum(tl.ceil(high / stride - 0.49), first), count * 1.0)
    return first.to(tl.int32), (end - first).to(tl.int32)


@triton.jit(do_not_specialize=(*_COUNTS, "num_classes"))
def _claim(
    logits,
    boxes,
    labels,
    valid,
    predicted,
    best,
    claims,
    height,
    width,
    num_points,
    num_boxes,
    num_classes,
    least_side,
    finest: tl.constexpr,
    num_levels: tl.constexpr,
    topk: tl.constexpr,
    room: tl.constexpr,
    block: tl.constexpr,
    ptx: tl.constexpr,
):
    number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    piece, num_pieces = tl.program_id(2), tl.num_programs(2)
    row = image * num_boxes + number
    if tl.load(valid + row) != 0:
        box = boxes + 4 * row
        label = tl.load(labels + row)
        box_x1, box_y1, box_x2, box_y2 = tl.load(box), tl.load(box + 1), tl.load(box + 2), tl.load(box + 3)
        box_angle = aspect_angle(box_x2 - box_x1, box_y2 - box_y1)
        centre_x, centre_y = (box_x1 + box_x2) * 0.5, (box_y1 + box_y2) * 0.5
        reach_x = tl.maximum(box_x2 - box_x1, least_side) * 0.5
        reach_y = tl.maximum(box_y2 - box_y1, least_side) * 0.5
        left, right, top, bottom = centre_x - reach_x, centre_x + reach_x, centre_y - reach_y, centre_y + reach_y

        place = tl.arange(0, room)
        kept = tl.where(place < topk, (-1 - place).to(tl.int64), _MOST)  # no claims yet, all of which differ
        worst = tl.min(kept, axis=0)
        begin = tl.full((), 0, tl.int32)
        for level in range(num_levels):
            stride = finest << level
            columns, rows = width // stride, height // stride
            first_column, wide = _cells_between(left, right, stride * 1.0, columns)
            first_row, high = _cells_between(top, bottom, stride * 1.0, rows)
            start = (piece + level) % num_pieces * block  # levels begin with different pieces: most are a block at most
            while start < wide * high:
                nth = start + tl.arange(0, block)
                down = nth // wide
                column, line = first_column + nth - down * wide, first_row + down
                x, y = (column + 0.5) * stride, (line + 0.5) * stride
                inside = (down < high) & (x > left) & (x < right) & (y > top) & (y < bottom)
                point = begin + line * columns + column
                cell = image * num_points + point
                x1, y1, x2, y2 = four(predicted + 4 * cell, inside)
                own = tl.load(logits + cell * num_classes + label, mask=inside, other=0.0).to(tl.float32)
                angle = aspect_angle(x2 - x1, y2 - y1)
                overlap = tl.maximum(ciou(box_x1, box_y1, box_x2, box_y2, box_angle, x1, y1, x2, y2, angle), 0.0)
                overlap = tl.where(inside, overlap, 0.0)
                tl.atomic_max(best + cell, _key(overlap, number), mask=overlap > 0, sem="relaxed")
                keys = _key(_alignment(own, overlap, ptx), point)
                key = tl.max(keys, axis=0)
                while (key > worst) & (key > 0):
                    kept = tl.where(kept == worst, key, kept)
                    worst = tl.min(kept, axis=0)
                    keys = tl.where(keys == key, 0, keys)
                    key = tl.max(keys, axis=0)
                start += num_pieces * block
            begin += columns * rows
        kept = tl.where(place < topk, tl.maximum(kept, 0), 0)
        tl.store(claims + (row * num_pieces + piece) * room + place, kept)


@triton.jit(do_not_specialize=(*_COUNTS, "num_pieces"))
def _pick(
    claims,
    valid,
    picked,
    first,
    last,
    best_overlap,
    best_alignment,
    num_points,
    num_boxes,
    num_pieces,
    topk: tl.constexpr,
    room: tl.constexpr,
    most_pieces: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0) * block + tl.arange(0, block)
    row = image * num_boxes + number
    real = number < num_boxes
    claiming = real & (tl.load(valid + row, mask=real, other=0) != 0)
    place = tl.arange(0, most_pieces * room)
    of_piece = (place < num_pieces * room)[None, :] & claiming[:, None]
    keys = tl.load(claims + row[:, None] * (num_pieces * room) + place[None, :], mask=of_piece, other=0)
    for turn in range(topk):
        key = tl.max(keys, axis=1)
        keys = tl.where(keys == key[:, None], 0, keys)
        point = _number(key)
        tl.atomic_min(first + image * num_points + point, number, mask=key > 0, sem="relaxed")
        tl.atomic_max(last + image * num_points + point, number, mask=key > 0, sem="relaxed")
        tl.store(picked + row * topk + turn, tl.where(key > 0, point, -1), mask=real)
    tl.store(best_overlap + row, tl.full((block,), 0.0, tl.float32), mask=real)
    tl.store(best_alignment + row, tl.full((block,), 0.0, tl.float32), mask=real)


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


@triton.jit(do_not_specialize=(*_COUNTS, "num_slots", "num_classes"))
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
    ptx: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    slot = tl.program_id(0) * block + tl.arange(0, block)
    real = slot < num_slots
    point, counts = _slot_point(picked, first, last, image, slot, real, num_slots, num_points, topk, every)
    cell = image * num_points + point
    lowest = tl.load(first + cell, mask=counts, other=0)
    highest = tl.load(last + cell, mask=counts, other=0)
    owner = tl.where(
        lowest == highest, lowest, _number(tl.load(best + cell, mask=counts & (lowest < highest), other=0))
    )
    row = image * num_boxes + owner
    box_x1, box_y1, box_x2, box_y2 = four(boxes + 4 * row, counts)
    x1, y1, x2, y2 = four(predicted + 4 * cell, counts)
    box_angle, angle = aspect_angle(box_x2 - box_x1, box_y2 - box_y1), aspect_angle(x2 - x1, y2 - y1)
    overlap = tl.maximum(ciou(box_x1, box_y1, box_x2, box_y2, box_angle, x1, y1, x2, y2, angle), 0.0)
    own = tl.load(logits + cell * num_classes + tl.load(labels + row, mask=counts, other=0), mask=counts, other=0.0)
    alignment = _alignment(own.to(tl.float32), overlap, ptx)
    tl.atomic_max(best_overlap + row, overlap, mask=counts, sem="relaxed")
    tl.atomic_max(best_alignment + row, alignment, mask=counts, sem="relaxed")
    tl.store(owners + image * num_slots + slot, tl.where(counts, owner, -1), mask=real)
    tl.store(alignments + image * num_slots + slot, alignment, mask=real)


@triton.jit(do_not_specialize=["num_boxes", "num_slots"])
def _target(
    picked,
    alignments,
    best_overlap,
    best_alignment,
    slot_owner,
    slot_point,
    slot_weight,
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
    row = image * num_boxes + owner
    overlap = tl.load(best_overlap + row, mask=counts, other=0.0)
    share = overlap / (tl.load(best_alignment + row, mask=counts, other=0.0) + _ALIGNMENT_EPS)
    score = tl.load(alignments + here, mask=counts, other=0.0) * share
    tl.store(slot_weight + here, tl.where(counts, score, 0.0), mask=real)
    tl.store(slot_point + here, tl.where(counts, point, -1), mask=real)
