from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.evaluation.coco_ap import coco_figures
from paceline.evaluation.curves import best_threshold, compute_curves
from paceline.evaluation.matching import match

if TYPE_CHECKING:
    from conftest import RandomSet
    from paceline.evaluation.ground_truth import GroundTruth
    from paceline.evaluation.matching import Matching
    from paceline.evaluation.table import DetectionTable


def plain_figures(
    truth: GroundTruth, detections: DetectionTable, matching: Matching, threshold: float
) -> list[tuple[float, float, float]]:
    """Precision, recall and F1 of each class at one threshold, from counts; NaN where a figure has no meaning."""
    figures = []
    for label in range(truth.num_classes):
        boxes = int(((truth.labels == label) & truth.counts).sum())
        kept = (detections.labels == label) & (detections.scores >= threshold) & ~matching.ignored
        detected, right = int(kept.sum()), int((kept & matching.correct).sum())
        if not boxes:
            figures.append((np.nan, np.nan, np.nan))
            continue
        precision = right / detected if detected else np.nan
        recall = right / boxes
        f1 = 2 * precision * recall / (precision + recall) if right else 0.0
        figures.append((precision, recall, f1))
    return figures


@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_every_point_of_the_curves_equals_plain_counting(random_set: RandomSet, seed: int) -> None:
    truth, detections = random_set(seed, difficult=True)
    matching = match(truth, detections, 0.5)
    curves = compute_curves(truth, detections, matching, coco_figures(truth, detections))
    for place in range(0, len(curves.thresholds), 25):
        expected = np.array(plain_figures(truth, detections, matching, curves.thresholds[place]))
        ours = np.stack((curves.precision[:, place], curves.recall[:, place], curves.f1[:, place]), axis=1)
        assert np.allclose(ours, expected, rtol=0, atol=1e-12, equal_nan=True)
        assert curves.mean_recall[place] == pytest.approx(np.nanmean(expected[:, 1]))
        assert curves.mean_f1[place] == pytest.approx(np.nanmean(expected[:, 2]))


@pytest.mark.parametrize("seed", range(6))
def test_the_best_threshold_is_the_best_of_all(random_set: RandomSet, seed: int) -> None:
    truth, detections = random_set(seed)
    matching = match(truth, detections, 0.5)
    best = best_threshold(truth, detections, matching)

    def mean_f1(threshold: float) -> float:
        return float(np.nanmean([f1 for _, _, f1 in plain_figures(truth, detections, matching, threshold)]))

    expected = np.array(plain_figures(truth, detections, matching, best.threshold))
    present = truth.num_boxes_of_class > 0
    assert np.allclose(best.precision[present], np.nan_to_num(expected[present, 0]), rtol=0, atol=1e-12)
    assert np.allclose(best.recall[present], expected[present, 1], rtol=0, atol=1e-12)
    assert np.allclose(best.f1[present], expected[present, 2], rtol=0, atol=1e-12)
    assert (best.f1[~present] == -1).all()
    assert mean_f1(best.threshold) == pytest.approx(max(map(mean_f1, detections.scores)), abs=1e-12)


def test_precision_over_recall_has_the_ap_as_its_mean(random_set: RandomSet) -> None:
    truth, detections = random_set(4)
    figures = coco_figures(truth, detections)
    curves = compute_curves(truth, detections, match(truth, detections, 0.5), figures)
    present = truth.num_boxes_of_class > 0
    assert np.allclose(curves.precision_at_recall[present].mean(axis=1), figures.ap50[present])
    assert curves.mean_precision_at_recall.mean() == pytest.approx(figures.summary[1])
    assert np.isnan(curves.precision_at_recall[~present]).all()


def test_without_detections_recall_is_zero_and_precision_undefined(random_set: RandomSet) -> None:
    truth, detections = random_set(0)
    nothing = detections.rows(np.zeros(len(detections), dtype=np.bool_))
    matching = match(truth, nothing, 0.5)
    curves = compute_curves(truth, nothing, matching, coco_figures(truth, nothing))
    best = best_threshold(truth, nothing, matching)
    assert not curves.mean_recall.any()
    assert np.isnan(curves.mean_precision).all()
    assert best.threshold == 0
    assert set(best.f1) == {0.0, -1.0}
