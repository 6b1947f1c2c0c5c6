"""Non-maximum suppression: of boxes that overlap, keep the one of the highest score.

The result is that of the plain greedy rule, to the box: go through the boxes from the highest score to the lowest
(equal scores: the lower input index first) and keep a box unless it overlaps one that was kept by more than the limit.

```
sorted candidates   |------ window ------|------ window ------| ...   ends when every image has max_det boxes
a window            |head|----- rest ----|                            what earlier kept boxes overlap has left it
                    the head against itself, exactly: the fixed point of `_settle`
                    its kept boxes against the rest, which moves up: its first boxes are the next head
```

So a box meets kept boxes only until one suppresses it, and memory is bounded by a window times a head. On a CPU the
same rule is compiled (`paceline.native.suppression`), which decides alike and takes a tenth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from paceline.boxes import EPS
from paceline.native.suppression import SUPPRESSION, suppress

if TYPE_CHECKING:
    from torch import Tensor

HEAD = 128
"""Candidates that are settled together."""
WINDOW = 2048
"""Candidates that are looked at before the next ones are touched."""
IMAGES_AT_ONCE = {"cpu": 1}
"""Images that are settled together, by type of device; a CPU takes one, whose numbers then stay in its cache."""
IMAGES_ON_ACCELERATOR = 32
"""Images that are settled together elsewhere, where few large operations are cheap."""
NOBODY = -1.0
"""Class of a place that holds no box: no candidate has it, so nothing is suppressed from there."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What suppression leaves of B images, best first."""

    indices: Tensor
    """BD, int64, places among the input's M boxes; 0 beyond `count`."""
    count: Tensor
    """B, int64, number of boxes kept of each image, at most D."""


class _Candidates(NamedTuple):
    """M boxes of B images, best first, as planes: comparing many pairs is then a handful of dense operations."""

    planes: Tensor
    """B6M: x1, y1, x2, y2, area, class."""
    place: Tensor
    """BM, rank in the sorted order."""
    alive: Tensor
    """BM, False where there is no box, or where it has been suppressed."""


@torch.no_grad()
def batched_nms(
    boxes_BM4: Tensor,
    scores_BM: Tensor,
    labels_BM: Tensor,
    valid_BM: Tensor,
    *,
    iou: float,
    max_det: int,
    agnostic: bool = False,
) -> Kept:
    """Keep up to `max_det` boxes of each image by their finite scores; only boxes that are `valid` count.

    A box goes when its IoU with a better one that stays is above `iou` (when equal, it stays). Boxes of different
    classes never suppress each other, unless `agnostic`. Boxes without area are never suppressed.
    """
    num_images = len(scores_BM)
    ranked = scores_BM.masked_fill(~valid_BM, -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    classes = torch.zeros_like(labels_BM) if agnostic else labels_BM
    planes = _planes(boxes_BM4, classes, order)
    num_valid = valid_BM.sum(dim=1)
    if not scores_BM.numel():
        nothing = torch.zeros((num_images, max_det), dtype=torch.int64, device=scores_BM.device)
        return Kept(indices=nothing, count=nothing.new_zeros(num_images))
    kernel = SUPPRESSION.get() if planes.device.type == "cpu" and planes.dtype == torch.float32 else None
    if kernel is None:
        kept = _by_torch(planes, num_valid, iou, max_det)
    else:
        found = suppress(kernel, planes.numpy(), num_valid.numpy(), iou=iou, eps=EPS, max_det=max_det)
        kept = Kept(indices=torch.from_numpy(found[0]), count=torch.from_numpy(found[1]))
    filled = torch.arange(max_det, device=order.device) < kept.count[:, None]
    return Kept(indices=order.gather(1, kept.indices).masked_fill_(~filled, 0), count=kept.count)


def _by_torch(planes: Tensor, num_valid: Tensor, iou: float, max_det: int) -> Kept:
    """Apply the greedy rule to sorted boxes B6M, a few images at a time; the indices that are kept are ranks."""
    step = IMAGES_AT_ONCE.get(planes.device.type, IMAGES_ON_ACCELERATOR)
    parts = [
        _greedy(planes[first : first + step], num_valid[first : first + step], iou, max_det)
        for first in range(0, len(planes), step)
    ]
    return Kept(indices=torch.cat([part.indices for part in parts]), count=torch.cat([part.count for part in parts]))


def _planes(boxes_BM4: Tensor, labels_BM: Tensor, order_BM: Tensor) -> Tensor:
    """Boxes in their sorted order as planes B6M (see `_Candidates`)."""
    x1, y1, x2, y2 = boxes_BM4.unbind(-1)
    area = (x2 - x1).clamp(min=0) * (y2 - y1).clamp(min=0)
    planes = torch.stack((x1, y1, x2, y2, area, labels_BM.to(boxes_BM4.dtype)), dim=1)
    return planes.gather(2, order_BM[:, None].expand(-1, 6, -1))


def _greedy(planes_B6M: Tensor, num_valid_B: Tensor, iou: float, max_det: int) -> Kept:
    """Apply the greedy rule to sorted boxes of a few images; the indices that are kept are ranks in their order."""
    num_images, _, num_boxes = planes_B6M.shape
    device = planes_B6M.device
    # One place more than can be kept takes what comes too late.
    kept = planes_B6M.new_full((num_images, 6, max_det + 1), NOBODY)
    ranks = torch.zeros((num_images, max_det + 1), dtype=torch.int64, device=device)
    count = torch.zeros(num_images, dtype=torch.int64, device=device)
    for start in range(0, num_boxes, WINDOW):
        planes = planes_B6M[..., start : start + WINDOW]
        place = torch.arange(start, start + planes.shape[2], device=device).expand(num_images, -1)
        alive = place < num_valid_B[:, None]
        if start:
            most = int(count.max())
            alive = alive & ~_overlaps(kept[..., :most], planes, iou).any(dim=1)
        window = _compact(_Candidates(planes, place, alive))
        while window.place.shape[1]:
            head, rest = _split(window)
            chosen = _settle(head, iou)
            slot = (count[:, None] + chosen.cumsum(dim=1) - 1).clamp(max=max_det).masked_fill_(~chosen, max_det)
            kept.scatter_(2, slot[:, None].expand(-1, 6, -1), head.planes)
            ranks.scatter_(1, slot, head.place)
            count = (count + chosen.sum(dim=1)).clamp(max=max_det)
            if int(count.min()) == max_det:
                break
            best = _compact(head._replace(alive=chosen)).planes
            suppressed = _overlaps(best, rest.planes, iou).any(dim=1)
            window = _compact(rest._replace(alive=rest.alive & ~suppressed))
        if int(count.min()) == max_det:
            break
    return Kept(indices=ranks[:, :max_det], count=count)


def _settle(head: _Candidates, iou: float) -> Tensor:
    """Say which boxes of a head the greedy rule keeps: BN, bool.

    A box stays if no better one that stays overlaps it. Start from "all stay" and apply that until nothing changes:
    after n rounds the first n boxes are right for good, so what no longer changes is the greedy answer. Chains of
    suppression are short: a few rounds do.
    """
    overlaps = _overlaps(head.planes, head.planes, iou).triu_(1)
    chosen = head.alive
    while True:
        again = head.alive & ~(overlaps & chosen[:, :, None]).any(dim=1)
        if torch.equal(again, chosen):
            return chosen
        chosen = again


def _overlaps(better_B6N: Tensor, worse_B6M: Tensor, iou: float) -> Tensor:
    """Say which pairs BNM are of one class and overlap by more than `iou`; the steps of `boxes.pairwise_iou`."""
    x1, y1, x2, y2, area, label = better_B6N[..., None].unbind(1)
    other_x1, other_y1, other_x2, other_y2, other_area, other_label = worse_B6M[:, :, None].unbind(1)
    width = torch.minimum(x2, other_x2).sub_(torch.maximum(x1, other_x1)).clamp_(min=0)
    height = torch.minimum(y2, other_y2).sub_(torch.maximum(y1, other_y1)).clamp_(min=0)
    intersection = width.mul_(height)
    union = torch.add(area, other_area, out=height).sub_(intersection).clamp_(min=EPS)
    return (intersection.div_(union) > iou).logical_and_(label == other_label)


def _split(window: _Candidates) -> tuple[_Candidates, _Candidates]:
    planes, place, alive = window
    return (
        _Candidates(planes[..., :HEAD], place[:, :HEAD], alive[:, :HEAD]),
        _Candidates(planes[..., HEAD:], place[:, HEAD:], alive[:, HEAD:]),
    )


def _compact(candidates: _Candidates) -> _Candidates:
    """Move the living to the front, in their order, and cut off what no image needs; the dead in between get no class.

    The number that is kept is that of the image with the most.
    """
    planes, place, alive = candidates
    if planes.shape[0] == 1:
        living = alive[0].nonzero().T
        return _Candidates(planes[:, :, living[0]], place[:, living[0]], torch.ones_like(living, dtype=torch.bool))
    most = int(alive.sum(dim=1).max())
    front = (~alive).to(torch.uint8).sort(dim=1, stable=True).indices[:, :most]
    alive = alive.gather(1, front)
    planes = planes.gather(2, front[:, None].expand(-1, 6, -1))
    planes[:, 5].masked_fill_(~alive, NOBODY)
    return _Candidates(planes, place.gather(1, front), alive)
