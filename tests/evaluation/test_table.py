from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from paceline.evaluation.table import DetectionTable

if TYPE_CHECKING:
    from conftest import RandomSet


def share(table: DetectionTable, images: list[int]) -> DetectionTable:
    part = table.rows(np.isin(table.images, images))
    return DetectionTable(
        seen=np.array(images), images=part.images, boxes=part.boxes, scores=part.scores, labels=part.labels
    )


def test_shares_of_ranks_join_to_the_whole(random_set: RandomSet) -> None:
    _, table = random_set(0)
    joined = DetectionTable.concatenate([share(table, [3, 1, 7, 10]), share(table, [0, 2, 4, 5, 6, 8, 9, 11])])
    joined = joined.sorted_by_image()
    for column in ("seen", "images", "boxes", "scores", "labels"):
        assert np.array_equal(getattr(joined, column), getattr(table, column)), column


def test_an_image_evaluated_twice_is_refused(random_set: RandomSet) -> None:
    _, table = random_set(0)
    with pytest.raises(AssertionError, match="twice"):
        DetectionTable.concatenate([share(table, [0, 1]), share(table, [1, 2])])


def test_joining_nothing_gives_an_empty_table() -> None:
    empty = DetectionTable.concatenate([])
    assert len(empty) == 0
    assert empty.boxes.shape == (0, 4)


def test_coco_json_carries_ids_corners_and_sizes(random_set: RandomSet) -> None:
    _, table = random_set(1)
    image_ids, category_ids = np.arange(12) * 10 + 5, np.array([1, 2, 7, 90])
    entries = json.loads(json.dumps(table.to_coco_json(image_ids, category_ids)))
    assert len(entries) == len(table)
    for row, entry in enumerate(entries):
        x, y, width, height = entry["bbox"]
        assert entry["image_id"] == table.images[row] * 10 + 5
        assert entry["category_id"] == category_ids[table.labels[row]]
        assert entry["score"] == table.scores[row]
        assert np.allclose((x, y, x + width, y + height), table.boxes[row], rtol=0, atol=1e-9)
