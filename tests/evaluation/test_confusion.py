from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.evaluation.confusion import confusion_matrix
from paceline.evaluation.ground_truth import GroundTruth
from paceline.evaluation.table import DetectionTable

if TYPE_CHECKING:
    from conftest import RandomSet


def scene(
    boxes: list[tuple[float, int, str]], detections: list[tuple[float, int, float]]
) -> tuple[GroundTruth, DetectionTable]:
    """One image; boxes of 10 x 10 px by their left side, class and kind, detections by left side, class and score."""
    truth = GroundTruth(
        num_images=1,
        num_classes=2,
        offsets=np.array([0, len(boxes)]),
        boxes=np.array([(left, 0, left + 10, 10) for left, _, _ in boxes], dtype=np.float64).reshape(-1, 4),
        labels=np.array([label for _, label, _ in boxes], dtype=np.int32),
        crowd=np.array([kind == "crowd" for _, _, kind in boxes], dtype=np.bool_),
        difficult=np.array([kind == "difficult" for _, _, kind in boxes], dtype=np.bool_),
        area=np.full(len(boxes), 100.0),
        sizes=np.array([[100, 100]], dtype=np.int32),
    )
    found = DetectionTable(
        seen=np.array([0]),
        images=np.zeros(len(detections), dtype=np.int64),
        boxes=np.array([(left, 0, left + 10, 10) for left, _, _ in detections], dtype=np.float64).reshape(-1, 4),
        scores=np.array([score for _, _, score in detections], dtype=np.float64),
        labels=np.array([label for _, label, _ in detections], dtype=np.int64),
    )
    return truth, found


def test_rows_are_predicted_and_columns_true() -> None:
    truth, found = scene(
        [(0, 0, ""), (20, 1, ""), (40, 1, ""), (60, 0, "crowd"), (80, 1, "difficult")],
        [
            (1, 0, 0.9),  # right
            (0, 0, 0.8),  # a second one of the same
            (21, 0, 0.7),  # taken for the other class
            (40, 1, 0.2),  # right, but not confident
            (60, 0, 0.9),  # in a crowd
            (61, 1, 0.9),  # in a crowd
            (80, 1, 0.9),  # difficult
        ],
    )
    matrix = confusion_matrix(truth, found)
    assert matrix.counts.tolist() == [[1, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert matrix.shares.sum(axis=0).tolist() == [1, 1, 1]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_box_and_every_confident_detection_is_counted_once(random_set: RandomSet, seed: int) -> None:
    truth, detections = random_set(seed, crowds=False)
    counts = confusion_matrix(truth, detections).counts
    confident = detections.labels[detections.scores >= 0.25]
    assert np.array_equal(counts[:, :-1].sum(axis=0), truth.num_boxes_of_class)
    assert np.array_equal(counts[:-1].sum(axis=1), np.bincount(confident, minlength=4))
    assert counts[-1, -1] == 0


def test_perfect_detections_stand_on_the_diagonal(random_set: RandomSet) -> None:
    truth, _ = random_set(0, crowds=False)
    perfect = DetectionTable(
        seen=np.arange(truth.num_images),
        images=truth.images,
        boxes=truth.boxes,
        scores=np.ones(len(truth.boxes)),
        labels=truth.labels.astype(np.int64),
    )
    assert np.array_equal(confusion_matrix(truth, perfect).counts, np.diag([*truth.num_boxes_of_class, 0]))


def test_nothing_true_and_nothing_found_counts_nothing() -> None:
    matrix = confusion_matrix(*scene([], []))
    assert not matrix.counts.any()
    assert not matrix.shares.any()
