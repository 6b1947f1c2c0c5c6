from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.evaluation import matching as matching_module
from paceline.evaluation.matching import NOTHING, match

if TYPE_CHECKING:
    from conftest import Pycocotools, RandomSet


@pytest.mark.parametrize("seed", range(8))
def test_equal_to_pycocotools_to_the_box(random_set: RandomSet, pycocotools_evaluation: Pycocotools, seed: int) -> None:
    """Crowds and ties of scores included."""
    truth, detections = random_set(seed)
    results = detections.to_coco_json(np.arange(truth.num_images), np.arange(truth.num_classes))
    evaluation = pycocotools_evaluation(truth, results)
    found = np.full(len(detections), NOTHING)
    ignored = np.zeros(len(detections), dtype=np.bool_)
    for entry in evaluation.evalImgs:
        if entry is not None and entry["aRng"] == evaluation.params.areaRng[0]:
            rows = np.array(entry["dtIds"], dtype=np.int64) - 1  # ids are counted from 1, and 0 means no match
            found[rows] = entry["dtMatches"][0].astype(np.int64) - 1
            ignored[rows] = entry["dtIgnore"][0]
    matching = match(truth, detections, 0.5)
    assert np.array_equal(matching.found, found)
    assert np.array_equal(matching.ignored, ignored)


@pytest.mark.parametrize("across_classes", [False, True])
def test_each_box_is_found_once_and_by_what_overlaps_it(random_set: RandomSet, across_classes: bool) -> None:
    truth, detections = random_set(4, difficult=True)
    matching = match(truth, detections, 0.45, across_classes=across_classes)
    rows = np.flatnonzero(matching.found != NOTHING)
    boxes = matching.found[rows]
    single = boxes[~truth.crowd[boxes]]
    assert len(np.unique(single)) == len(single) > 0
    assert np.array_equal(truth.images[boxes], detections.images[rows])
    assert np.array_equal(truth.labels[boxes], detections.labels[rows]) != across_classes
    assert np.array_equal(matching.ignored[rows], truth.crowd[boxes] | truth.difficult[boxes])


def test_the_number_of_pairs_at_once_changes_nothing(random_set: RandomSet, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, detections = random_set(5)
    whole = match(truth, detections, 0.5)
    monkeypatch.setattr(matching_module, "PAIRS_AT_ONCE", 7)
    assert np.array_equal(match(truth, detections, 0.5).found, whole.found)


def test_without_boxes_nothing_is_found(random_set: RandomSet) -> None:
    truth, detections = random_set(0, max_boxes=0)
    matching = match(truth, detections, 0.5)
    assert len(detections) > 0
    assert not matching.correct.any()
    assert not matching.ignored.any()
