"""Matching: which detection finds which true box at one IoU threshold, by COCO's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.evaluation.table import xywh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from paceline.evaluation.ground_truth import GroundTruth
    from paceline.evaluation.table import DetectionTable

PAIRS_AT_ONCE = 2_000_000
"""Pairs whose overlap is computed together, a bound on memory."""
NOTHING = -1


@dataclass(frozen=True, kw_only=True)
class Matching:
    """What became of D detections."""

    found: NDArray[np.int64]
    """D, row of the true box that the detection found; -1 for none. Crowds and difficult boxes may be among them."""
    ignored: NDArray[np.bool_]
    """D, True where the detection counts neither as right nor as wrong."""

    @property
    def correct(self) -> NDArray[np.bool_]:
        """D, True positives."""
        correct: NDArray[np.bool_] = (self.found != NOTHING) & ~self.ignored
        return correct


def match(
    ground_truth: GroundTruth, detections: DetectionTable, iou: float, *, across_classes: bool = False
) -> Matching:
    """Let the detections of each image and class, best score first, each take the free box that it overlaps most.

    The overlap has to be `iou` at least. Boxes that count go before crowds and difficult ones; a crowd is never taken
    away, and overlap with it is the share of the detection inside it. Equal scores go in the table's order; of equal
    overlaps the later box is taken. With `across_classes` a detection may take a box of any class.
    """
    found = np.full(len(detections), NOTHING, dtype=np.int64)
    rank = np.empty(len(detections), dtype=np.int64)
    rank[np.argsort(-detections.scores, kind="stable")] = np.arange(len(detections))
    detection, box, overlap = _close_pairs(ground_truth, detections, iou, across_classes)
    # Best detection first; its boxes from the one it likes best: those that count, then the highest overlap.
    order = np.lexsort((-box, -overlap, ~ground_truth.counts[box], rank[detection]))
    crowd = ground_truth.crowd[box]
    taken: set[int] = set()
    settled = NOTHING
    pairs = zip(detection[order].tolist(), box[order].tolist(), crowd[order].tolist(), strict=True)
    for current, candidate, is_crowd in pairs:
        if current == settled or (candidate in taken and not is_crowd):
            continue
        found[current] = candidate
        taken.add(candidate)
        settled = current
    ignored = (found != NOTHING) & ~ground_truth.counts[found] if len(ground_truth.counts) else found != NOTHING
    return Matching(found=found, ignored=ignored)


def _close_pairs(
    ground_truth: GroundTruth, detections: DetectionTable, iou: float, across_classes: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """List detection, true box and overlap of all pairs of one image (and class) that overlap by `iou` at least."""
    num_classes = 1 if across_classes else ground_truth.num_classes
    key = ground_truth.images * num_classes + (0 if across_classes else ground_truth.labels)
    wanted = detections.images * num_classes + (0 if across_classes else detections.labels)
    by_key = np.argsort(key, kind="stable")
    first = np.searchsorted(key[by_key], wanted, side="left")
    number = np.searchsorted(key[by_key], wanted, side="right") - first
    boxes, others = xywh(ground_truth.boxes), xywh(detections.boxes)
    pieces = []
    for part in _portions(number):
        detection = np.repeat(np.arange(part.start, part.stop), number[part])
        within = np.arange(len(detection)) - np.repeat(np.cumsum(number[part]) - number[part], number[part])
        box = by_key[first[detection] + within]
        overlap = _overlap(others[detection], boxes[box], ground_truth.crowd[box])
        close = overlap >= min(iou, 1 - 1e-10)
        pieces.append((detection[close], box[close], overlap[close]))
    nothing = np.zeros(0, np.int64)
    return (
        np.concatenate([nothing, *(piece[0] for piece in pieces)]),
        np.concatenate([nothing, *(piece[1] for piece in pieces)]),
        np.concatenate([np.zeros(0), *(piece[2] for piece in pieces)]),
    )


def _portions(number: NDArray[np.int64]) -> Iterator[slice]:
    """Cut the detections into runs of at most `PAIRS_AT_ONCE` pairs, or of one detection."""
    total = np.cumsum(number)
    start = 0
    while start < len(number):
        done = int(total[start - 1]) if start else 0
        stop = max(int(np.searchsorted(total, done + PAIRS_AT_ONCE, side="right")), start + 1)
        yield slice(start, stop)
        start = stop


def _overlap(detection: NDArray[np.float64], box: NDArray[np.float64], crowd: NDArray[np.bool_]) -> NDArray[np.float64]:
    """IoU of paired boxes N4 (x, y, width, height), operation by operation as COCO's tools compute it."""
    low = np.maximum(detection[:, :2], box[:, :2])
    high = np.minimum(detection[:, :2] + detection[:, 2:], box[:, :2] + box[:, 2:])
    sides = np.maximum(high - low, 0)
    intersection = sides[:, 0] * sides[:, 1]
    area = detection[:, 2] * detection[:, 3]
    union = np.where(crowd, area, area + box[:, 2] * box[:, 3] - intersection)
    overlap: NDArray[np.float64] = np.divide(intersection, union, out=np.zeros_like(union), where=intersection > 0)
    return overlap
