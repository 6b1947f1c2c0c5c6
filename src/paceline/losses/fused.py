"""Fused: what kernels find in one walk over all points, as tensors of fixed shapes and sums that can be differentiated.

The same law as `assign.py`, for a GPU. This module needs Triton; nothing imports it before tensors on a GPU ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.losses.kernels import _claim, _class_gradient, _contest, _search, _sum_classes, _target

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch

_MOST_PAIRS = 2**26
"""Pairs of points and ground truths that are looked at together, at most, at 4 bytes each; one image always is."""
_POINTS, _SCANNED, _SLOTS, _LOGITS = 128, 1024, 128, 2048
"""Lanes of a program of each kernel; they change the time only."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What B images learn: in dense tables of their A points, and in the S slots of each, where few have a weight.

    A slot is room for one claim. Each point that learns something has its weight in exactly one slot.
    """

    label: Tensor
    """BA, int32, class that a point learns; -1 where it learns none."""
    weight: Tensor
    """BA, float32, target score, 0 where the point learns none."""
    cell: Tensor
    """BS, int64, number of the slot's point among all BA."""
    slot_weight: Tensor
    """BS, float32, target score, 0 in slots that do not count."""
    slot_box: Tensor
    """BS4, float32, the ground truth of the slot's point, xyxy in pixels; zeros in slots that do not count."""
    slot_point: Tensor
    """BS2, float32, the slot's point."""
    slot_stride: Tensor
    """BS, float32, its stride."""


@torch.no_grad()
def assign(
    raw: Tensor,
    logits: Tensor,
    points: Tensor,
    strides: Tensor,
    batch: Batch,
    *,
    topk: int,
    least_side_px: float,
    most_pairs: int = _MOST_PAIRS,
) -> Targets:
    """Assign contiguous raw outputs BA(4R) and logits BAK of any floating type, R a power of two; float32 A2 and A."""
    num_images, num_points, num_classes = logits.shape
    num_boxes = batch.labels.shape[1]
    num_slots = min(num_boxes * topk, num_points)
    every = num_slots == num_points
    boxes, labels = batch.boxes.contiguous(), batch.labels.contiguous()
    valid = batch.valid.contiguous().view(torch.uint8)
    bins = raw.shape[-1] // 4

    predicted = points.new_empty(num_images, num_points, 4)
    best, first, last, label = predicted.new_empty(4, num_images, num_points, dtype=torch.int32)
    weight = predicted.new_empty(num_images, num_points)
    picked = best.new_empty(num_images, num_boxes, topk)
    step = min(max(most_pairs // (num_boxes * num_points), 1), num_images)
    alignment = predicted.new_empty(step, num_boxes, num_points)
    owner, slot_alignment = best.new_empty(num_images, num_slots), predicted.new_empty(num_images, num_slots)
    best_overlap, best_alignment = predicted.new_zeros(2, num_images, num_boxes)
    targets = Targets(
        label=label,
        weight=weight,
        cell=labels.new_empty(num_images, num_slots),
        slot_weight=predicted.new_empty(num_images, num_slots),
        slot_box=predicted.new_empty(num_images, num_slots, 4),
        slot_point=predicted.new_empty(num_images, num_slots, 2),
        slot_stride=predicted.new_empty(num_images, num_slots),
    )
    with torch.cuda.device_of(raw):
        for start in range(0, num_images, step):
            part = slice(start, start + step)
            images = min(step, num_images - start)
            _search[_blocks(num_points, _POINTS), images](
                raw[part],
                logits[part],
                points,
                strides,
                boxes[part],
                labels[part],
                valid[part],
                predicted[part],
                alignment,
                best[part],
                first[part],
                last[part],
                label[part],
                weight[part],
                num_points,
                num_boxes,
                num_classes,
                least_side_px,
                bins=bins,
                block=_POINTS,
                num_warps=4,
            )
            _claim[num_boxes, images](
                alignment,
                valid[part],
                picked[part],
                first[part],
                last[part],
                num_points,
                num_boxes,
                topk=topk,
                block=_SCANNED,
                num_warps=4,
            )
        _contest[_blocks(num_slots, _SLOTS), num_images](
            logits,
            boxes,
            labels,
            predicted,
            picked,
            best,
            first,
            last,
            owner,
            slot_alignment,
            best_overlap,
            best_alignment,
            num_points,
            num_boxes,
            num_slots,
            num_classes,
            topk=topk,
            every=every,
            block=_SLOTS,
            num_warps=4,
        )
        _target[_blocks(num_slots, _SLOTS), num_images](
            points,
            strides,
            boxes,
            labels,
            picked,
            owner,
            slot_alignment,
            best_overlap,
            best_alignment,
            label,
            weight,
            targets.cell,
            targets.slot_weight,
            targets.slot_box,
            targets.slot_point,
            targets.slot_stride,
            num_points,
            num_boxes,
            num_slots,
            every=every,
            block=_SLOTS,
            num_warps=4,
        )
    return targets


def class_sum(logits: Tensor, targets: Targets) -> Tensor:
    """Sum of the binary cross-entropies of contiguous logits BAK, float32; its gradient has the type of the logits."""
    return _ClassSum.apply(logits, targets.label, targets.weight)  # type: ignore[no-any-return, no-untyped-call]


class _ClassSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(logits, label, weight)
        num_blocks = _blocks(logits.numel(), _LOGITS)
        sums = weight.new_empty(num_blocks)
        with torch.cuda.device_of(logits):
            _sum_classes[num_blocks,](
                logits, label, weight, sums, logits.numel(), num_classes=logits.shape[-1], block=_LOGITS, num_warps=4
            )
        return sums.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_sum: Tensor) -> tuple[Tensor, None, None]:
        logits, label, weight = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        with torch.cuda.device_of(logits):
            _class_gradient[_blocks(logits.numel(), _LOGITS),](
                logits,
                label,
                weight,
                of_sum,
                gradient,
                logits.numel(),
                num_classes=logits.shape[-1],
                block=_LOGITS,
                num_warps=4,
            )
        return gradient, None, None


def _blocks(count: int, block: int) -> int:
    return -(-count // block)
