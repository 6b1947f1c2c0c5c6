"""Curves: precision, recall and F1 over the score threshold, and precision over recall, all at IoU .5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.evaluation.coco_ap import CocoFigures
    from paceline.evaluation.ground_truth import GroundTruth
    from paceline.evaluation.matching import Matching
    from paceline.evaluation.table import DetectionTable

NUM_THRESHOLDS = 1001


@dataclass(frozen=True, kw_only=True)
class BestThreshold:
    """The score from which on detections count, chosen so that the mean F1 over classes with boxes is highest."""

    threshold: float
    """0 when there are no detections."""
    precision: NDArray[np.float64]
    """K, 0 for a class without detections there, -1 for one without boxes; the others alike."""
    recall: NDArray[np.float64]
    """K."""
    f1: NDArray[np.float64]
    """K."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """What the pictures of curves show. NaN where a figure is undefined: no detections, or a class without boxes.

    The mean curves are over the classes with boxes where the figure is defined.
    """

    thresholds: NDArray[np.float64]
    """T scores from 0 to 1; detections of this score and above count."""
    precision: NDArray[np.float64]
    """KT."""
    recall: NDArray[np.float64]
    """KT."""
    f1: NDArray[np.float64]
    """KT; 0 where nothing is detected."""
    mean_precision: NDArray[np.float64]
    """T."""
    mean_recall: NDArray[np.float64]
    """T."""
    mean_f1: NDArray[np.float64]
    """T."""
    recalls: NDArray[np.float64]
    """R recalls from 0 to 1."""
    precision_at_recall: NDArray[np.float64]
    """KR, COCO's interpolated precision: the best at this recall or a higher one. Its mean over R is the AP50."""
    mean_precision_at_recall: NDArray[np.float64]
    """R."""


def best_threshold(ground_truth: GroundTruth, detections: DetectionTable, matching: Matching) -> BestThreshold:
    """Find the threshold, exactly: among the scores that occur. Of equal ones the highest."""
    num_boxes = ground_truth.num_boxes_of_class
    counted = ~matching.ignored & (num_boxes[detections.labels] > 0)
    labels, scores, correct = detections.labels[counted], detections.scores[counted], matching.correct[counted]
    if not len(scores):
        zero = np.where(num_boxes > 0, 0.0, -1.0)
        return BestThreshold(threshold=0.0, precision=zero, recall=zero.copy(), f1=zero.copy())
    # Within a class, best first: F1 = 2 x correct / (detections + boxes) after each detection.
    order = np.lexsort((-scores, labels))
    labels, scores, correct = labels[order], scores[order], correct[order]
    start = np.searchsorted(labels, labels, side="left")
    detected = np.arange(len(labels)) - start + 1
    total = np.cumsum(correct)
    right: NDArray[np.int64] = total - (total - correct)[start]
    f1 = 2 * right / (detected + num_boxes[labels])
    # Each detection changes the F1 of its own class alone, so the sum over classes is a running sum of the changes.
    change = np.diff(f1, prepend=0.0)
    first = detected == 1
    change[first] = f1[first]
    by_score = np.argsort(-scores, kind="stable")
    falling = scores[by_score]
    complete = np.append(falling[1:] != falling[:-1], True)  # all detections of this score are in
    mean = np.where(complete, np.cumsum(change[by_score]), -np.inf)
    threshold = float(falling[np.argmax(mean)])
    return _at_threshold(ground_truth, labels, scores, correct, threshold)


def _at_threshold(
    ground_truth: GroundTruth,
    labels: NDArray[np.int64],
    scores: NDArray[np.float64],
    correct: NDArray[np.bool_],
    threshold: float,
) -> BestThreshold:
    num_boxes = ground_truth.num_boxes_of_class
    kept = scores >= threshold
    detected = np.bincount(labels[kept], minlength=ground_truth.num_classes)
    right = np.bincount(labels[kept & correct], minlength=ground_truth.num_classes)
    absent = num_boxes == 0
    return BestThreshold(
        threshold=threshold,
        precision=np.where(absent, -1.0, right / np.maximum(detected, 1)),
        recall=np.where(absent, -1.0, right / np.maximum(num_boxes, 1)),
        f1=np.where(absent, -1.0, 2 * right / np.maximum(detected + num_boxes, 1)),
    )


def compute_curves(
    ground_truth: GroundTruth, detections: DetectionTable, matching: Matching, figures: CocoFigures
) -> Curves:
    """Compute all curves; the matching is that at IoU .5 within classes."""
    num_boxes = ground_truth.num_boxes_of_class.astype(np.float64)[:, None]
    thresholds = np.linspace(0.0, 1.0, NUM_THRESHOLDS)
    counted = ~matching.ignored
    detected = _count_from(thresholds, detections, counted, ground_truth.num_classes)
    right = _count_from(thresholds, detections, matching.correct, ground_truth.num_classes)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(num_boxes > 0, right / detected, np.nan)
        recall = np.where(num_boxes > 0, right / num_boxes, np.nan)
        f1 = np.where(num_boxes > 0, 2 * right / (detected + num_boxes), np.nan)
    at_recall = np.where(num_boxes > 0, figures.precision50, np.nan)
    return Curves(
        thresholds=thresholds,
        precision=precision,
        recall=recall,
        f1=f1,
        mean_precision=_mean_of_defined(precision),
        mean_recall=_mean_of_defined(recall),
        mean_f1=_mean_of_defined(f1),
        recalls=figures.recalls,
        precision_at_recall=at_recall,
        mean_precision_at_recall=_mean_of_defined(at_recall),
    )


def _count_from(
    thresholds: NDArray[np.float64], detections: DetectionTable, mask: NDArray[np.bool_], num_classes: int
) -> NDArray[np.float64]:
    """Count the detections of each class in the mask with each threshold's score or above: KT."""
    highest = np.searchsorted(thresholds, detections.scores[mask], side="right") - 1
    cell = detections.labels[mask] * len(thresholds) + np.maximum(highest, 0)
    histogram = np.bincount(cell, minlength=num_classes * len(thresholds)).reshape(num_classes, len(thresholds))
    from_above: NDArray[np.float64] = histogram[:, ::-1].cumsum(axis=1)[:, ::-1].astype(np.float64)
    return from_above


def _mean_of_defined(curves: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the rows that are not NaN; NaN where all are."""
    defined = ~np.isnan(curves)
    number = defined.sum(axis=0)
    total = np.where(defined, curves, 0.0).sum(axis=0)
    mean: NDArray[np.float64] = np.divide(total, number, out=np.full(curves.shape[1], np.nan), where=number > 0)
    return mean
