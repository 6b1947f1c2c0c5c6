"""Cleaning rows keeps good boxes as they are, whatever bad ones stand among them."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paceline.data.findings import FindingCollector
from paceline.data.rows import Rows, clean


def _rows(boxes: np.ndarray, labels: list[int] | None = None, images: list[int] | None = None) -> Rows:
    number = len(boxes)
    return Rows(
        images=np.array(images if images is not None else [0] * number, np.int64),
        lines=np.arange(1, number + 1),
        labels=np.array(labels if labels is not None else [0] * number, np.int64),
        boxes=np.asarray(boxes, np.float64).reshape(-1, 4),
        crowd=np.zeros(number, np.bool_),
        difficult=np.zeros(number, np.bool_),
        area=np.full(number, np.nan),
    )


def _clean(rows: Rows, num_classes: int = 2) -> tuple[Rows, dict[str, int]]:
    collector = FindingCollector()
    return clean(rows, np.array([[40, 60], [10, 10]]), num_classes, str, collector), {
        kind: number for kind, number in collector.counts.items() if number
    }


@given(arrays.arrays(np.float64, st.tuples(st.integers(0, 12), st.just(4)), elements=st.floats(-100, 100)))
def test_cleaned_boxes_lie_inside_and_cleaning_twice_changes_nothing(boxes: np.ndarray) -> None:
    cleaned, counts = _clean(_rows(boxes))
    assert (cleaned.boxes >= 0).all()
    assert (cleaned.boxes <= [60, 40, 60, 40]).all()
    assert (cleaned.boxes[:, :2] < cleaned.boxes[:, 2:]).all()
    assert len(cleaned) + sum(counts.get(kind, 0) for kind in ("degenerate", "range", "duplicate")) == len(boxes)
    again, counts = _clean(cleaned)
    assert np.array_equal(again.boxes, cleaned.boxes)
    assert not counts


def test_each_fault_is_named_and_good_boxes_stay() -> None:
    good = [1.0, 2.0, 30.0, 20.0]
    boxes = [good, [np.nan, 0, 1, 1], [0, 0, np.inf, 1], [5, 5, 5, 9], [9, 9, 5, 20], [70, 0, 90, 10], good, good]
    cleaned, counts = _clean(_rows(np.array(boxes), labels=[0, 0, 0, 0, 0, 0, 0, 2]))
    assert counts == {"number": 2, "degenerate": 2, "range": 1, "duplicate": 1, "class": 1}
    assert cleaned.boxes.tolist() == [good]
    assert cleaned.lines.tolist() == [1]


def test_equal_boxes_of_other_classes_or_images_are_no_duplicates() -> None:
    box = np.array([[1, 1, 5, 5]] * 3)
    cleaned, counts = _clean(_rows(box, labels=[0, 1, 0], images=[0, 0, 1]))
    assert len(cleaned) == 3
    assert not counts


def test_overhang_is_clipped_and_noted_unless_it_is_rounding() -> None:
    cleaned, counts = _clean(_rows(np.array([[-5, 2, 30, 20], [-0.01, 3, 60.01, 20]])))
    assert counts == {"clipped": 1}
    assert cleaned.boxes.tolist() == [[0, 2, 30, 20], [0, 3, 60, 20]]


def test_area_is_that_of_the_annotation_where_it_has_one() -> None:
    rows = _rows(np.array([[0, 0, 10, 10], [0, 0, 10, 20]]))
    rows.area[0] = 7
    assert _clean(rows)[0].area.tolist() == [7, 200]
