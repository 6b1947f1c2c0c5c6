"""Fused: the assignment and the sums of the loss by a few kernels, differentiable, for tensors on a GPU.

The same law as `assign.py` and `detection.py`. Needs Triton; nothing imports it before tensors on a GPU ask for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.losses.assign_kernels import _claim, _contest, _decode, _pick, _target
from paceline.losses.sum_kernels import _add_up, _fill_gradients, _slot_gradients, _sum_slots, _sum_softplus
from paceline.triton_kernels import cdiv, has_ptx, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from torch import Tensor

    from paceline.batch import Batch

_DECODED = {"block": 512}
"""Sides that a program decodes."""
_CLAIMED = {"block": 256, "num_warps": 4}
"""Points inside a box that a program looks at together."""
_PIECES, _MANY_BOXES = 4, 8192
"""Programs that share the points inside a box, and boxes from which on it is one."""
_PICKED = {"block": 2, "num_warps": 1}
"""Ground truths of a program that joins what those have claimed."""
_SLOTS, _ROWS = {"block": 128}, {"block": 32}
"""Slots of a program, and slots with their bins."""
_SUMMED = {"block": 512, "steps": 16}
_FILLED = {"block": 1024, "steps": 4}
"""Logits that a program takes together, and how often, for the sum and for the gradient."""
_ADDED = {"block": 1024}
"""Sums that are added up together."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Where the A points of images of a size lie: in cells of levels whose strides double."""

    points: Tensor
    """A2, float32, x and y in pixels, as `anchor_points` orders them."""
    strides: Tensor
    """A, float32, in pixels."""
    size_hw: tuple[int, int]
    """Height and width in pixels, multiples of every stride."""
    finest: int
    """Stride of the first level in pixels."""
    num_levels: int


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What B images learn, in the S slots of each.

    A slot is room for one claim; each point that is claimed counts in exactly one.
    """

    predicted: Tensor
    """BA4, float32, predicted boxes, xyxy in pixels."""
    slot_point: Tensor
    """BS, int32, point that a slot counts for; -1 in slots that do not count."""
    slot_owner: Tensor
    """BS, int32, number of that point's ground truth; -1 in slots that do not count."""
    slot_weight: Tensor
    """BS, float32, its target score; 0 in slots that do not count."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """What the parts of the loss are multiplied by."""

    box: float
    cls: float
    dfl: float


@torch.no_grad()
def assign(raw: Tensor, logits: Tensor, grid: Grid, batch: Batch, *, topk: int, least_side_px: float) -> Targets:
    """Assign raw outputs BA(4R) and logits BAK, contiguous, R a power of two."""
    num_images, num_points, num_classes = logits.shape
    assert num_points == len(grid.points), (logits.shape, grid.points.shape)
    num_boxes = batch.labels.shape[1]
    num_slots = min(num_boxes * topk, num_points)
    every = num_slots == num_points  # a slot per point is then less than one per claim
    boxes, labels = batch.boxes.contiguous(), batch.labels.contiguous()
    valid = batch.valid.contiguous().view(torch.uint8)
    pieces = _PIECES if num_images * num_boxes < _MANY_BOXES else 1
    room, ptx = next_power_of_2(topk), has_ptx(raw)

    points = grid.points
    predicted = points.new_empty(num_images, num_points, 4)
    best = points.new_empty(num_images, num_points, dtype=torch.int64)
    first, last = points.new_empty(2, num_images, num_points, dtype=torch.int32)
    claims = best.new_empty(num_images, num_boxes, pieces, room)
    picked = first.new_empty(num_images, num_boxes, topk)
    slot_point, slot_owner = first.new_empty(2, num_images, num_slots)
    slot_alignment, slot_weight = points.new_empty(2, num_images, num_slots)
    best_overlap, best_alignment = points.new_empty(2, num_images, num_boxes)
    with _current(raw):
        start_kernel(
            _decode,
            (cdiv(4 * num_points, _DECODED["block"]), num_images),
            raw,
            points,
            grid.strides,
            predicted,
            best,
            first,
            last,
            num_points,
            num_boxes,
            bins=raw.shape[-1] // 4,
            **_DECODED,
            ptx=ptx,
        )
        start_kernel(
            _claim,
            (num_boxes, num_images, pieces),
            logits,
            boxes,
            labels,
            valid,
            predicted,
            best,
            claims,
            *grid.size_hw,
            num_points,
            num_boxes,
            num_classes,
            least_side_px,
            finest=grid.finest,
            num_levels=grid.num_levels,
            topk=topk,
            room=room,
            **_CLAIMED,
            ptx=ptx,
        )
        start_kernel(
            _pick,
            (cdiv(num_boxes, _PICKED["block"]), num_images),
            claims,
            valid,
            picked,
            first,
            last,
            best_overlap,
            best_alignment,
            num_points,
            num_boxes,
            pieces,
            topk=topk,
            room=room,
            most_pieces=_PIECES,
            **_PICKED,
        )
        start_kernel(
            _contest,
            (cdiv(num_slots, _SLOTS["block"]), num_images),
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
            **_SLOTS,
            ptx=ptx,
        )
        start_kernel(
            _target,
            (cdiv(num_slots, _SLOTS["block"]), num_images),
            picked,
            slot_alignment,
            best_overlap,
            best_alignment,
            slot_owner,
            slot_point,
            slot_weight,
            num_boxes,
            num_slots,
            every=every,
            **_SLOTS,
        )
    return Targets(predicted=predicted, slot_point=slot_point, slot_owner=slot_owner, slot_weight=slot_weight)


def sums(
    raw: Tensor, logits: Tensor, grid: Grid, batch: Batch, targets: Targets, gains: Gains
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Sum up the overlap part, the classes and the focal part, weighed, and the target scores, which have no gradient.

    Returns the total of the first three, these, and the last: float32, without dimensions.
    raw, logits: BA(4R) and BAK, contiguous; their gradients have their types.
    """
    truth = (batch.boxes.contiguous(), batch.labels.contiguous())
    slots = (targets.predicted, targets.slot_owner, targets.slot_point, targets.slot_weight)
    found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _Sums.apply(  # type: ignore[no-untyped-call]
        raw, logits, (gains.box, gains.cls, gains.dfl), grid.points, grid.strides, *truth, *slots
    )
    return found


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, logits: Tensor, gains: tuple[float, float, float], *given: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(raw, logits, *given)
        ctx.gains = gains
        ctx.set_materialize_grads(False)
        points, _, boxes, _, _, _, slot_point, weight = given
        num_images, num_slots = slot_point.shape
        num_rows, num_blocks = (
            cdiv(num_slots, _ROWS["block"]),
            cdiv(logits.numel(), _SUMMED["block"] * _SUMMED["steps"]),
        )
        of_rows, of_blocks = weight.new_empty(num_images * num_rows, 4), weight.new_empty(num_blocks)
        found = weight.new_empty(5)
        with _current(raw):
            start_kernel(
                _sum_slots,
                (num_rows, num_images),
                raw,
                logits,
                *given,
                of_rows,
                len(points),
                boxes.shape[1],
                num_slots,
                logits.shape[-1],
                bins=raw.shape[-1] // 4,
                **_ROWS,
            )
            start_kernel(
                _sum_softplus,
                (num_blocks,),
                logits,
                of_blocks,
                logits.numel(),
                **_SUMMED,
                ptx=has_ptx(raw),
            )
            start_kernel(_add_up, (1,), of_rows, of_blocks, found, *gains, len(of_rows), num_blocks, **_ADDED)
        total, box, classes, focal, normaliser = found.unbind()
        ctx.mark_non_differentiable(normaliser)
        return total, box, classes, focal, normaliser

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_total: Tensor | None, *of_parts: Tensor | None) -> tuple[Tensor | None, ...]:
        raw, logits, *given = ctx.saved_tensors
        points, _, boxes, _, _, _, slot_point, weight = given
        num_images, num_slots = slot_point.shape
        of_raw, of_logits = torch.empty_like(raw), torch.empty_like(logits)
        slopes = [_joined(of_total, of_part, weight) for of_part in of_parts[:3]]
        lanes = _FILLED["block"] * _FILLED["steps"]
        with _current(raw):
            start_kernel(
                _fill_gradients,
                (cdiv(logits.numel(), lanes) + cdiv(raw.numel(), lanes),),
                logits,
                slopes[1],
                ctx.gains[1],
                of_raw,
                of_logits,
                raw.numel(),
                logits.numel(),
                **_FILLED,
                ptx=has_ptx(raw),
            )
            start_kernel(
                _slot_gradients,
                (cdiv(num_slots, _ROWS["block"]), num_images),
                raw,
                logits,
                *given,
                *slopes,
                *ctx.gains,
                of_raw,
                of_logits,
                len(points),
                boxes.shape[1],
                num_slots,
                logits.shape[-1],
                bins=raw.shape[-1] // 4,
                **_ROWS,
                ptx=has_ptx(raw),
            )
        return of_raw, of_logits, None, *(None for _ in given)


def _joined(of_total: Tensor | None, of_part: Tensor | None, like: Tensor) -> Tensor:
    """Gradient of a part, itself and through the total; most often it comes through that alone."""
    if of_total is None:
        return like.new_zeros(()) if of_part is None else of_part
    return of_total if of_part is None else of_total + of_part


def _current(tensor: Tensor) -> AbstractContextManager[object]:
    """Make the device of a tensor the current one, which is where Triton launches."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
