"""Fused: the assignment and the sums of the loss by a few kernels, differentiable, for tensors on a GPU.

The same law as `assign.py` and `detection.py`. Needs Triton; nothing imports it before tensors on a GPU ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.losses.assign_kernels import _claim, _contest, _search, _target
from paceline.losses.sum_kernels import _box_gradient, _class_gradient, _sum_boxes, _sum_classes
from paceline.triton_kernels import start_kernel

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from paceline.batch import Batch

_MOST_PAIRS = 2**26
"""Pairs of points and ground truths that are looked at together, at most, at 4 bytes each; one image always is."""
_POINTS, _SCANNED, _SLOTS, _ROWS, _LOGITS = 128, 1024, 128, 32, 2048
"""Lanes of a program: of points, of points for a claim, of slots, of slots with their bins, of logits."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What B images learn: in tables of their A points, and in the S slots of each.

    A slot is room for one claim; each point that is claimed counts in exactly one.
    """

    predicted: Tensor
    """BA4, float32, predicted boxes, xyxy in pixels."""
    label: Tensor
    """BA, int32, class that a point learns; -1 where it learns none."""
    weight: Tensor
    """BA, float32, target score, 0 where the point learns none."""
    slot_point: Tensor
    """BS, int32, point that a slot counts for; -1 in slots that do not count."""
    slot_owner: Tensor
    """BS, int32, number of that point's ground truth; -1 in slots that do not count."""
    slot_weight: Tensor
    """BS, float32, its target score; 0 in slots that do not count."""


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
    """Assign raw outputs BA(4R) and logits BAK, contiguous, R a power of two, with points A2 and strides A, float32."""
    num_images, num_points, num_classes = logits.shape
    num_boxes = batch.labels.shape[1]
    num_slots = min(num_boxes * topk, num_points)
    every = num_slots == num_points  # a slot per point is then less than one per claim
    boxes, labels = batch.boxes.contiguous(), batch.labels.contiguous()
    valid = batch.valid.contiguous().view(torch.uint8)

    predicted, weight = points.new_empty(num_images, num_points, 4), points.new_empty(num_images, num_points)
    best, first, last, label = points.new_empty(4, num_images, num_points, dtype=torch.int32)
    picked = best.new_empty(num_images, num_boxes, topk)
    step = min(max(most_pairs // (num_boxes * num_points), 1), num_images)
    alignment = points.new_empty(step, num_boxes, num_points)
    slot_point, slot_owner = best.new_empty(2, num_images, num_slots)
    slot_alignment, slot_weight = points.new_empty(2, num_images, num_slots)
    best_overlap, best_alignment = points.new_zeros(2, num_images, num_boxes)
    with _current(raw):
        for start in range(0, num_images, step):
            part = slice(start, start + step)
            images = min(step, num_images - start)
            start_kernel(
                _search,
                (_blocks(num_points, _POINTS), images),
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
                bins=raw.shape[-1] // 4,
                block=_POINTS,
            )
            start_kernel(
                _claim,
                (num_boxes, images),
                alignment,
                valid[part],
                picked[part],
                first[part],
                last[part],
                num_points,
                num_boxes,
                topk=topk,
                block=_SCANNED,
            )
        start_kernel(
            _contest,
            (_blocks(num_slots, _SLOTS), num_images),
            logits,
            boxes,
            labels,
            predicted,
            picked,
            best,
            first,
            last,
            slot_owner,
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
        )
        start_kernel(
            _target,
            (_blocks(num_slots, _SLOTS), num_images),
            labels,
            picked,
            slot_alignment,
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
            every=every,
            block=_SLOTS,
        )
    return Targets(
        predicted=predicted,
        label=label,
        weight=weight,
        slot_point=slot_point,
        slot_owner=slot_owner,
        slot_weight=slot_weight,
    )


def sums(
    raw: Tensor, logits: Tensor, points: Tensor, strides: Tensor, boxes: Tensor, targets: Targets
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum up the overlap part, the classes, the focal part and the weights: float32, without dimensions.

    raw, logits: BA(4R) and BAK, contiguous; their gradients have their types. boxes: BG4, xyxy in pixels.
    """
    tables = (targets.predicted, targets.slot_owner, targets.slot_point, targets.slot_weight)
    found: tuple[Tensor, Tensor, Tensor, Tensor] = _Sums.apply(  # type: ignore[no-untyped-call]
        raw, logits, points, strides, boxes.contiguous(), *tables, targets.label, targets.weight
    )
    return found


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, raw: Tensor, logits: Tensor, *given: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ctx.save_for_backward(raw, logits, *given)
        points, _, boxes, _, _, slot_point, weight, *classes = given
        num_images, num_slots = slot_point.shape
        num_rows, num_blocks = _blocks(num_slots, _ROWS), _blocks(logits.numel(), _LOGITS)
        of_rows, of_blocks = weight.new_empty(num_images * num_rows, 3), weight.new_empty(num_blocks)
        with _current(raw):
            start_kernel(
                _sum_boxes,
                (num_rows, num_images),
                raw,
                *given[:7],
                of_rows,
                len(points),
                boxes.shape[1],
                num_slots,
                bins=raw.shape[-1] // 4,
                block=_ROWS,
            )
            start_kernel(
                _sum_classes,
                (num_blocks,),
                logits,
                *classes,
                of_blocks,
                logits.numel(),
                num_classes=logits.shape[-1],
                block=_LOGITS,
            )
        box, focal, normaliser = of_rows.sum(dim=0).unbind()
        ctx.mark_non_differentiable(normaliser)
        return box, of_blocks.sum(), focal, normaliser

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_box: Tensor, of_classes: Tensor, of_focal: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        raw, logits, *given = ctx.saved_tensors
        points, _, boxes, _, _, slot_point, _, *classes = given
        num_images, num_slots = slot_point.shape
        of_raw, of_logits = torch.zeros_like(raw), torch.empty_like(logits)
        with _current(raw):
            start_kernel(
                _box_gradient,
                (_blocks(num_slots, _ROWS), num_images),
                raw,
                *given[:7],
                of_box,
                of_focal,
                of_raw,
                len(points),
                boxes.shape[1],
                num_slots,
                bins=raw.shape[-1] // 4,
                block=_ROWS,
            )
            start_kernel(
                _class_gradient,
                (_blocks(logits.numel(), _LOGITS),),
                logits,
                *classes,
                of_classes,
                of_logits,
                logits.numel(),
                num_classes=logits.shape[-1],
                block=_LOGITS,
            )
        return of_raw, of_logits, *(None for _ in given)


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, which is where Triton launches."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def _blocks(count: int, block: int) -> int:
    return -(-count // block)
