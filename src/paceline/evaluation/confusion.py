"""Confusion matrix: what was detected where which class was true."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.evaluation.matching import NOTHING, match

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.evaluation.ground_truth import GroundTruth
    from paceline.evaluation.table import DetectionTable

CONFIDENCE = 0.25
IOU = 0.45


@dataclass(frozen=True, kw_only=True)
class ConfusionMatrix:
    """Counts of pairs; rows are what was predicted, columns what is true.

    The last row holds true boxes that nothing was detected at, the last column detections where there is nothing.
    """

    counts: NDArray[np.int64]
    """(K + 1)(K + 1)."""
    confidence: float
    """Score from which on detections count."""
    iou: float
    """Overlap that a detection needs to be of a box."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """(K + 1)(K + 1): each column divided by its sum, 0 where that is 0."""
        total = self.counts.sum(axis=0, keepdims=True)
        shares: NDArray[np.float64] = self.counts / np.maximum(total, 1)
        return shares


def confusion_matrix(
    ground_truth: GroundTruth, detections: DetectionTable, *, confidence: float = CONFIDENCE, iou: float = IOU
) -> ConfusionMatrix:
    """Let confident detections, best first, each take the free box of any class that it overlaps most, and count.

    Crowds and difficult boxes count neither as true nor, for the detections on them, as background.
    """
    confident = detections.rows(detections.scores >= confidence)
    matching = match(ground_truth, confident, iou, across_classes=True)
    background = ground_truth.num_classes
    counts = np.zeros((background + 1, background + 1), dtype=np.int64)
    found = matching.found[matching.correct]
    np.add.at(counts, (confident.labels[matching.correct], ground_truth.labels[found]), 1)
    unfounded = confident.labels[matching.found == NOTHING]
    counts[:background, background] = np.bincount(unfounded, minlength=background)
    missed = ground_truth.counts.copy()
    missed[found] = False
    counts[background, :background] = np.bincount(ground_truth.labels[missed], minlength=background)
    return ConfusionMatrix(counts=counts, confidence=confidence, iou=iou)
