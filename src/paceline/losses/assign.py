"""Task-aligned assignment: which points of an image learn which ground truth, and how strongly.

    candidates    points inside the ground truth's box, sides shorter than the second stride widened to it
    alignment     score of its class ^ 0.5  x  overlap ^ 6,  overlap = CIoU or 0
    claims        each ground truth claims the 10 candidates of the highest alignment, if it is above 0
    contest       a point claimed more than once goes to the ground truth of the highest overlap among all that hold
                  the point, whether they claimed it or not; the first of equals
    target score  alignment x best overlap / best alignment, the two bests over the points that a ground truth got

The table of all pairs, B x G x A, is never built at once: both searches below walk over it in pieces and keep, for
each point, its first and last claimant and its best overlap so far. Which search is used depends on the machine alone,
and the outcome does not depend on which; a caller may ask for fixed shapes everywhere:

- `search_all_pairs` looks at every pair. Its shapes follow from B, G and A, it never waits for the device, and it can
  be compiled and captured in a graph.
- `search_inside_pairs` lists the pairs that are inside, which are a hundredth of them, and looks at those. It needs
  counts from the data, which cost nothing where host and device are the same.

Source: arXiv 2108.07755, section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

from paceline.boxes import aspect_angle, ciou_of_sides, cxcywh_to_xyxy, paired_ciou, xyxy_to_cxcywh

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT_EPS = 1e-9
"""Added to the best alignment that target scores are divided by."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every point of every image is to learn."""

    ground_truth: Tensor
    """BA, int64, number of the ground truth in its image; 0 where the point learns none."""
    target_score: Tensor
    """BA, in [0, 1], 0 where the point learns none; carries no gradient."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What an assignment looks at: A predictions and G padded ground truths in each of B images."""

    points: Tensor
    """A2, x and y in pixels."""
    predicted_boxes: Tensor
    """BA4, xyxy in pixels."""
    logits: Tensor
    """BAK, class scores before the sigmoid."""
    boxes: Tensor
    """BG4, xyxy in pixels."""
    labels: Tensor
    """BG, int64."""
    valid: Tensor
    """BG, bool."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """B, G and A."""
        return self.boxes.shape[0], self.boxes.shape[1], self.points.shape[0]


@dataclass(frozen=True, kw_only=True)
class Claims:
    """Who claims each of the BA points, as far as a search has come; ground truths are seen in rising order."""

    first: Tensor
    """BA, int64, lowest number of a claimant; G where there is none."""
    last: Tensor
    """BA, int64, highest number of a claimant; -1 where there is none."""
    best_overlap: Tensor
    """BA, highest overlap with a ground truth that holds the point."""
    best: Tensor
    """BA, int64, the first ground truth of that overlap."""

    @classmethod
    def none(cls, scene: Scene) -> Self:
        """No claim anywhere."""
        num_images, num_boxes, num_points = scene.shape
        first = scene.labels.new_full((num_images, num_points), num_boxes)
        best_overlap = scene.predicted_boxes.new_zeros(num_images, num_points)
        return cls(
            first=first, last=torch.full_like(first, -1), best_overlap=best_overlap, best=torch.zeros_like(first)
        )

    def merge(self, later: Claims) -> Self:
        """Join with the claims of ground truths of higher numbers."""
        better = later.best_overlap > self.best_overlap
        return type(self)(
            first=torch.minimum(self.first, later.first),
            last=torch.maximum(self.last, later.last),
            best_overlap=torch.where(better, later.best_overlap, self.best_overlap),
            best=torch.where(better, later.best, self.best),
        )

    def settle(self) -> tuple[Tensor, Tensor]:
        """Give every claimed point to one ground truth BA (0 where unclaimed), and say which BA are claimed."""
        claimed = self.last >= 0
        owner = torch.where(self.first == self.last, self.first, self.best)
        return torch.where(claimed, owner, 0), claimed


@dataclass(frozen=True, kw_only=True)
class TaskAlignedAssigner:
    """Assigns points to ground truths; see the head of this file."""

    topk: int = 10
    """Points that a ground truth may claim."""
    least_side_px: float = 16.0
    """Shorter sides are widened to this for the choice of candidates."""
    max_pairs: int = 2**23
    """Pairs that are looked at together, at most: it bounds the memory, at about 50 bytes each."""
    fixed_shapes: bool = False
    """Whether no shape may follow from the data on a CPU either, as a compiler or a graph needs it."""

    @torch.no_grad()
    def __call__(self, scene: Scene) -> Assignment:
        """Assign the points of all images at once; at least one padded ground truth is needed."""
        listed = not self.fixed_shapes and may_ask(scene.boxes)
        claims = self.search_inside_pairs(scene) if listed else self.search_all_pairs(scene)
        owner, claimed = claims.settle()
        return Assignment(ground_truth=owner, target_score=_target_scores(scene, owner, claimed))

    def search_all_pairs(self, scene: Scene) -> Claims:
        """Find the claims by looking at every pair, some ground truths of all images at a time."""
        num_images, num_boxes, num_points = scene.shape
        step = max(self.max_pairs // (num_images * num_points), 1)
        predicted = [side.unsqueeze(1) for side in scene.predicted_boxes.unbind(-1)]
        predicted_aspect = aspect_angle(scene.predicted_boxes).unsqueeze(1)
        logits_BKA = scene.logits.transpose(1, 2)
        claims = Claims.none(scene)
        for start in range(0, num_boxes, step):
            part = slice(start, min(start + step, num_boxes))
            boxes, labels = scene.boxes[:, part], scene.labels[:, part]
            overlap_BGA = ciou_of_sides(
                [side.unsqueeze(-1) for side in boxes.unbind(-1)],
                predicted,
                aspect_angle(boxes).unsqueeze(-1),
                predicted_aspect,
            )
            inside = self._inside(boxes, scene.points) & scene.valid[:, part].unsqueeze(-1)
            overlap_BGA = torch.where(inside, overlap_BGA.clamp(min=0), 0)
            own_logits = logits_BKA.gather(1, labels.unsqueeze(-1).expand(-1, -1, num_points))
            alignment, picked = _alignment(own_logits, overlap_BGA).topk(min(self.topk, num_points), dim=-1)

            number = torch.arange(part.start, part.stop, device=labels.device).view(1, -1, 1)
            claimed = (alignment > 0).flatten(1)
            number, picked = number.expand_as(picked).flatten(1), picked.flatten(1)
            none = Claims.none(scene)
            best_overlap, best = overlap_BGA.max(dim=1)
            claims = claims.merge(
                Claims(
                    first=none.first.scatter_reduce(1, picked, torch.where(claimed, number, num_boxes), "amin"),
                    last=none.last.scatter_reduce(1, picked, torch.where(claimed, number, -1), "amax"),
                    best_overlap=best_overlap,
                    best=best + start,
                )
            )
        return claims

    def search_inside_pairs(self, scene: Scene) -> Claims:
        """Find the claims by listing the points inside each box, some boxes at a time."""
        step = max(self.max_pairs // scene.shape[2], 1)
        claims = Claims.none(scene)
        rows = scene.valid.flatten().nonzero()[:, 0]
        for start in range(0, len(rows), step):
            claims = claims.merge(self._claims_of_rows(scene, rows[start : start + step]))
        return claims

    def _claims_of_rows(self, scene: Scene, rows: Tensor) -> Claims:
        """Find the claims of some ground truths, by their numbers N, rising, in the flattened BG."""
        _, num_boxes, num_points = scene.shape
        boxes, labels = scene.boxes.flatten(0, 1)[rows], scene.labels.flatten()[rows]
        image, number = rows // num_boxes, rows % num_boxes
        row, point = self._inside(boxes, scene.points).nonzero().unbind(-1)
        cell = image[row] * num_points + point

        predicted = scene.predicted_boxes.flatten(0, 1)
        overlap = ciou_of_sides(
            [side[row] for side in boxes.unbind(-1)],
            predicted[cell].unbind(-1),
            aspect_angle(boxes)[row],
            aspect_angle(predicted)[cell],
        ).clamp(min=0)
        alignment = _alignment(scene.logits[image[row], point, labels[row]], overlap)

        # One line per ground truth, its candidates first, then zeros, so that one call finds the best of all lines.
        count = torch.bincount(row, minlength=len(rows))
        start = count.cumsum(0) - count
        table = alignment.new_zeros(len(rows), max(int(count.max()), self.topk))
        table[row, torch.arange(len(row)) - start[row]] = alignment
        best_alignment, place = table.topk(self.topk, dim=1)
        picked = (start.unsqueeze(-1) + place)[best_alignment > 0]

        number = number[row]
        none = Claims.none(scene)
        best_overlap = none.best_overlap.flatten().scatter_reduce(0, cell, overlap, "amax")
        of_best = torch.where(overlap == best_overlap[cell], number, num_boxes)
        best = none.first.flatten().scatter_reduce(0, cell, of_best, "amin")
        return Claims(
            first=none.first.flatten().scatter_reduce(0, cell[picked], number[picked], "amin").view_as(none.first),
            last=none.last.flatten().scatter_reduce(0, cell[picked], number[picked], "amax").view_as(none.last),
            best_overlap=best_overlap.view_as(none.best_overlap),
            best=best.view_as(none.best),
        )

    def _inside(self, boxes: Tensor, points: Tensor) -> Tensor:
        """Say which points A2 are inside the boxes ...N4, short sides widened: ...NA."""
        centre, sides = torch.split(xyxy_to_cxcywh(boxes), 2, dim=-1)
        widened = cxcywh_to_xyxy(torch.cat((centre, sides.clamp(min=self.least_side_px)), dim=-1))
        x1, y1, x2, y2 = widened.unsqueeze(-2).unbind(-1)
        x, y = points.unbind(-1)
        inside = x > x1
        for further in (x < x2, y > y1, y < y2):
            inside &= further
        return inside


def may_ask(data: Tensor) -> bool:
    """Say whether shapes may follow from such data: where host and device are the same, asking costs nothing."""
    return data.device.type == "cpu" and not torch.compiler.is_compiling()


def _alignment(logits: Tensor, overlaps: Tensor) -> Tensor:
    """How well a prediction suits a ground truth: score^0.5 x overlap^6, of the shape of both."""
    return logits.sigmoid().sqrt() * (overlaps.square() * overlaps).square()


def _target_scores(scene: Scene, owner: Tensor, claimed: Tensor) -> Tensor:
    """Target score BA of every point, from its ground truth BA and whether it has one BA."""
    boxes = scene.boxes.gather(1, owner.unsqueeze(-1).expand(-1, -1, 4))
    logits = scene.logits.gather(2, scene.labels.gather(1, owner).unsqueeze(-1)).squeeze(-1)
    overlap = torch.where(claimed, paired_ciou(boxes, scene.predicted_boxes).clamp(min=0), 0)
    alignment = _alignment(logits, overlap)
    zeros = overlap.new_zeros(scene.labels.shape)
    best_overlap = zeros.scatter_reduce(1, owner, overlap, "amax")
    best_alignment = zeros.scatter_reduce(1, owner, alignment, "amax")
    return alignment * (best_overlap / (best_alignment + ALIGNMENT_EPS)).gather(1, owner)
