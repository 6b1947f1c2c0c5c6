"""Postprocessing: from the network's raw outputs to detections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.boxes import anchor_points, decode_boxes
from paceline.errors import UserError
from paceline.evaluation.nms import batched_nms

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.evaluation.config import PostprocessConfig

MAX_CANDIDATES = 30_000
"""Candidates of one image that suppression looks at: the best ones. A network in its first steps may have every
(point, class) pair above the threshold, 672,000 at 640 px with 80 classes, of which 300 detections are kept."""


@dataclass(frozen=True, kw_only=True)
class Detections:
    """Detections of B images, best first, padded to D per image; zeros beyond `count`."""

    boxes: Tensor
    """BD4, float32, xyxy in pixels of the network's input; they may reach beyond its border."""
    scores: Tensor
    """BD, float32, in (0, 1]."""
    labels: Tensor
    """BD, int64."""
    count: Tensor
    """B, int64, number of detections of each image."""


@torch.no_grad()
def postprocess(
    predictions: tuple[Tensor, ...],
    size_hw: tuple[int, int],
    config: PostprocessConfig,
    *,
    classes: Sequence[int] = (),
) -> Detections:
    """Decode raw outputs (boxes BA(4R), class logits BAK) for an input of `size_hw` pixels and suppress overlaps.

    Every (point, class) pair whose score is `config.conf` or more is a candidate, so that a point may give several
    detections; pairs of equal score rank by point, then class. Points whose numbers are not finite give none.
    `classes` keeps these classes alone; none named means all. Raises UserError for a class the network does not have.
    """
    raw, logits = predictions
    boxes_BA4, scores_BAK = _decode(raw, logits, size_hw)
    above_BAK = (scores_BAK >= config.conf) & boxes_BA4.isfinite().all(dim=-1, keepdim=True)
    if classes:
        above_BAK &= _wanted(classes, logits.shape[-1], logits.device)
    scores_BM, pairs_BM, valid_BM = _gather_candidates(scores_BAK.flatten(1), above_BAK.flatten(1))
    labels_BM = pairs_BM % logits.shape[-1]
    boxes_BM4 = _pick(boxes_BA4, pairs_BM // logits.shape[-1])
    kept = batched_nms(
        boxes_BM4,
        scores_BM,
        labels_BM,
        valid_BM,
        iou=config.iou,
        max_det=config.max_det,
        agnostic=config.agnostic_nms,
    )
    empty = torch.arange(config.max_det, device=raw.device) >= kept.count[:, None]
    if not pairs_BM.shape[1]:
        return _no_detections(kept.indices.shape, kept.count)
    return Detections(
        boxes=_pick(boxes_BM4, kept.indices).masked_fill(empty[..., None], 0),
        scores=scores_BM.gather(1, kept.indices).masked_fill(empty, 0),
        labels=labels_BM.gather(1, kept.indices).masked_fill(empty, 0),
        count=kept.count,
    )


def _decode(raw: Tensor, logits: Tensor, size_hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Turn raw outputs into boxes BA4 and scores BAK, in float32 even where the caller's precision is mixed."""
    with torch.autocast(raw.device.type, enabled=False):
        points, strides = anchor_points(size_hw, device=raw.device)
        return decode_boxes(raw.float(), points, strides), logits.float().sigmoid()


def _gather_candidates(scores_BP: Tensor, above_BP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Collect the pairs `above` the threshold of each image, in their order, padded to the M of the image with most.

    Returns scores BM, the pairs' numbers BM in [0, P), and a mask BM of what is no padding. M is at most
    `MAX_CANDIDATES`: the best are taken, of equal scores the first.
    """
    image, pair, count, most = _list(above_BP)
    if most > MAX_CANDIDATES:
        image, pair, count, most = _list(_best(scores_BP, above_BP, MAX_CANDIDATES))
    slot = torch.arange(len(image), device=count.device) - (count.cumsum(0) - count)[image]
    pairs = torch.zeros((len(count), most), dtype=torch.int64, device=count.device)
    pairs[image, slot] = pair
    valid = torch.arange(most, device=count.device) < count[:, None]
    return scores_BP.gather(1, pairs), pairs, valid


def _list(above_BP: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """Image and number of every pair of the mask, how many each image B has, and the highest such number."""
    image, pair = above_BP.nonzero(as_tuple=True)
    count = torch.bincount(image, minlength=len(above_BP))
    return image, pair, count, int(count.max()) if len(count) else 0


def _best(scores_BP: Tensor, above_BP: Tensor, most: int) -> Tensor:
    """Narrow the mask to the `most` best pairs of each image; of equal scores the first."""
    scores_BP = scores_BP.masked_fill(~above_BP, -1.0)
    last = scores_BP.topk(most, dim=1).values[:, -1:]
    better, equal = scores_BP > last, scores_BP == last
    room = most - better.sum(dim=1, keepdim=True, dtype=torch.int32)
    return above_BP & (better | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room)))


def _wanted(classes: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    for number in classes:
        if not 0 <= number < num_classes:
            raise UserError(
                f"There is no class {number}: this network has {num_classes}, numbered from 0; correct `classes`."
            )
    wanted = torch.zeros(num_classes, dtype=torch.bool, device=device)
    wanted[list(classes)] = True
    return wanted


def _pick(boxes: Tensor, indices: Tensor) -> Tensor:
    """Take boxes of BM4 by indices BD: BD4."""
    return boxes.gather(1, indices[..., None].expand(-1, -1, 4))


def _no_detections(shape: torch.Size, count: Tensor) -> Detections:
    scores = torch.zeros(shape, device=count.device)
    return Detections(
        boxes=scores[..., None].expand(-1, -1, 4).clone(),
        scores=scores,
        labels=torch.zeros(shape, dtype=torch.int64, device=count.device),
        count=count,
    )
