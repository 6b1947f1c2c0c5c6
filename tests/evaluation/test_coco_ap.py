from __future__ import annotations

import gc
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from paceline.evaluation import coco_ap
from paceline.evaluation.coco_ap import CocoFigures, coco_figures
from paceline.evaluation.ground_truth import GroundTruth
from paceline.evaluation.table import DetectionTable

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Pycocotools, RandomSet


def assert_equal_to_pycocotools(figures: CocoFigures, evaluation: Any) -> None:
    assert np.allclose(figures.summary, evaluation.stats, rtol=0, atol=1e-9)
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    assert np.allclose(figures.ap, precision.mean(axis=(0, 1)), rtol=0, atol=1e-9)
    assert np.allclose(figures.ap50, precision[0].mean(axis=0), rtol=0, atol=1e-9)
    assert np.allclose(figures.precision50, precision[0].T, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_equal_to_pycocotools(random_set: RandomSet, pycocotools_evaluation: Pycocotools, seed: int) -> None:
    truth, detections = random_set(seed)
    results = detections.to_coco_json(np.arange(truth.num_images), np.arange(truth.num_classes))
    figures = coco_figures(truth, detections)
    assert max(figures.summary) > 0.05
    assert_equal_to_pycocotools(figures, pycocotools_evaluation(truth, results))


@pytest.mark.parametrize("parts", [2, 3, 99])
def test_the_classes_in_parts_give_the_same_figures(random_set: RandomSet, parts: int) -> None:
    truth, detections = random_set(3, num_classes=5)
    whole, split = coco_figures(truth, detections), coco_figures(truth, detections, parts=parts)
    assert split.summary == whole.summary
    for name in ("ap", "ap50", "recalls", "precision50"):
        assert np.array_equal(getattr(split, name), getattr(whole, name)), name


@pytest.mark.parametrize("seed", [0, 1])
def test_much_work_is_done_in_parts_that_are_gone_before_the_next(
    random_set: RandomSet, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What lives at once is bounded, whatever the set, and the figures stay as they are."""
    most, num_images, num_classes = 600, 40, 60
    truth, detections = random_set(seed, num_images=num_images, num_classes=num_classes, max_detections=60)
    whole = coco_figures(truth, detections)
    assert num_images * num_classes + len(truth.boxes) + len(detections) > 5 * most
    of_a_class = np.bincount(truth.labels, minlength=num_classes) + np.bincount(
        detections.labels, minlength=num_classes
    )
    largest = num_images + int(of_a_class.max())
    alive, pairs = [], []
    index = coco_ap._coco

    def counted(annotations: list[dict[str, Any]], images: range, classes: np.ndarray) -> Any:
        pairs.append(len(images) * len(classes))
        alive.append(sum(type(thing) is dict and "bbox" in thing for thing in gc.get_objects()))
        return index(annotations, images, classes)

    monkeypatch.setattr(coco_ap, "_coco", counted)
    monkeypatch.setattr(coco_ap, "MOST_OF_A_PART", most)
    before = sum(type(thing) is dict and "bbox" in thing for thing in gc.get_objects())
    parted = coco_figures(truth, detections)
    assert sum(pairs) == 2 * num_images * num_classes  # each class once, of truth and of detections
    assert max(pairs) + max(alive) - before <= most + largest
    assert len(pairs) > 10
    assert parted.summary == whole.summary
    for name in ("ap", "ap50", "recalls", "precision50"):
        assert np.array_equal(getattr(parted, name), getattr(whole, name)), name


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("most", [1, 20, 300])
def test_a_huge_class_is_scored_by_parts_of_its_images(
    random_set: RandomSet, pycocotools_evaluation: Pycocotools, monkeypatch: pytest.MonkeyPatch, seed: int, most: int
) -> None:
    """Bounded whatever the number of images, to the same figures: ties, crowds, empty images, and all ranges."""
    truth, detections = random_set(
        seed, num_images=40, num_classes=1 + seed % 3, max_detections=150 if seed % 2 else 25, max_boxes=12
    )
    whole = coco_figures(truth, detections)
    largest, index = [], coco_ap._coco

    def counted(annotations: list[dict[str, Any]], images: range, classes: np.ndarray) -> Any:
        largest.append(len(annotations) / len(images))
        return index(annotations, images, classes)

    monkeypatch.setattr(coco_ap, "_coco", counted)
    monkeypatch.setattr(coco_ap, "MOST_OF_A_PART", most)
    parted = coco_figures(truth, detections)
    assert len(largest) > 4 * truth.num_classes or most == 300, "some classes are then in one part, some in several"
    assert np.allclose(parted.summary, whole.summary, rtol=0, atol=1e-12)
    for name in ("ap", "ap50", "recalls", "precision50"):
        assert np.allclose(getattr(parted, name), getattr(whole, name), rtol=0, atol=1e-12), name
    results = detections.to_coco_json(np.arange(truth.num_images), np.arange(truth.num_classes))
    assert_equal_to_pycocotools(parted, pycocotools_evaluation(truth, results))


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_to_pycocotools_with_more_than_a_hundred_detections(
    random_set: RandomSet, pycocotools_evaluation: Pycocotools, seed: int
) -> None:
    truth, detections = random_set(seed, num_images=4, num_classes=2, max_boxes=40, max_detections=300)
    _, per_pair = np.unique(detections.images * 2 + detections.labels, return_counts=True)
    assert per_pair.max() > 100
    results = detections.to_coco_json(np.arange(4), np.arange(2))
    assert_equal_to_pycocotools(coco_figures(truth, detections), pycocotools_evaluation(truth, results))


def test_equal_to_pycocotools_on_an_annotation_file(shared: Path, pycocotools_evaluation: Pycocotools) -> None:
    """A published file as it stands, category ids with gaps, segment areas and crowds included."""
    dataset = json.loads((shared / "data/coco33/instances.json").read_text())
    truth, image_ids, category_ids = read_instances(dataset)
    assert truth.crowd.any()
    random = np.random.default_rng(0)
    rows = np.repeat(np.arange(len(truth.boxes)), 5)
    side = np.tile(truth.boxes[rows, 2:] - truth.boxes[rows, :2], 2)
    found = np.concatenate((truth.boxes, truth.boxes[rows] + random.normal(0, 0.08, (len(rows), 4)) * side))
    rows = np.concatenate((np.arange(len(truth.boxes)), rows))
    detections = DetectionTable(
        seen=np.arange(truth.num_images),
        images=truth.images[rows],
        boxes=found,
        scores=random.random(len(rows)).astype(np.float32).astype(np.float64),
        labels=truth.labels[rows].astype(np.int64),
    )
    evaluation = pycocotools_evaluation(dataset, detections.to_coco_json(image_ids, category_ids))
    assert_equal_to_pycocotools(coco_figures(truth, detections), evaluation)


def read_instances(dataset: dict[str, Any]) -> tuple[GroundTruth, np.ndarray, np.ndarray]:
    image_ids = np.array(sorted(image["id"] for image in dataset["images"]))
    category_ids = np.array(sorted(category["id"] for category in dataset["categories"]))
    annotations = sorted(dataset["annotations"], key=lambda annotation: annotation["image_id"])
    images = np.searchsorted(image_ids, [annotation["image_id"] for annotation in annotations])
    boxes = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64)
    boxes[:, 2:] += boxes[:, :2]
    labels = np.searchsorted(category_ids, [annotation["category_id"] for annotation in annotations])
    truth = GroundTruth(
        num_images=len(image_ids),
        num_classes=len(category_ids),
        offsets=np.searchsorted(images, np.arange(len(image_ids) + 1)),
        boxes=boxes,
        labels=labels.astype(np.int32),
        crowd=np.array([annotation["iscrowd"] == 1 for annotation in annotations]),
        difficult=np.zeros(len(annotations), dtype=np.bool_),
        area=np.array([annotation["area"] for annotation in annotations], dtype=np.float64),
        sizes=np.ones((len(image_ids), 2), dtype=np.int32),
    )
    return truth, image_ids, category_ids


def plain_ap(truth: GroundTruth, detections: DetectionTable, iou: float) -> list[float]:
    """AP of each class at one threshold, difficult boxes ignored, written down box by box; no crowds."""
    figures = []
    for label in range(truth.num_classes):
        outcome: list[tuple[float, bool]] = []
        for image in range(truth.num_images):
            boxes = np.flatnonzero((truth.images == image) & (truth.labels == label))
            rows = np.flatnonzero((detections.images == image) & (detections.labels == label))
            free = set(boxes.tolist())
            for row in sorted(rows.tolist(), key=lambda row: -detections.scores[row]):
                overlaps = {box: plain_iou(detections.boxes[row], truth.boxes[box]) for box in sorted(free)}
                close = [box for box in overlaps if overlaps[box] >= iou]
                close.sort(key=lambda box: (truth.difficult[box], -overlaps[box]))
                if close:
                    free.remove(close[0])
                if not close or not truth.difficult[close[0]]:
                    outcome.append((detections.scores[row], bool(close)))
        number = int(((truth.labels == label) & ~truth.difficult).sum())
        right = np.cumsum([good for _, good in sorted(outcome, key=lambda pair: -pair[0])])
        precision = right / np.arange(1, len(right) + 1)
        best = [max(precision[right >= recall * number - 1e-9], default=0.0) for recall in np.linspace(0, 1, 101)]
        figures.append(float(np.mean(best)) if number else -1.0)
    return figures


def plain_iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    areas = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
    return float(width * height / (areas - width * height))


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_difficult_boxes_count_neither_way(random_set: RandomSet, seed: int) -> None:
    truth, detections = random_set(seed, crowds=False, difficult=True)
    assert truth.difficult.any()
    assert np.allclose(coco_figures(truth, detections).ap50, plain_ap(truth, detections, 0.5), rtol=0, atol=1e-9)


def test_difficult_boxes_are_neither_missed_nor_false(random_set: RandomSet) -> None:
    """All difficult boxes found, or none of them: the same figures, but for those of the first 1 or 10 detections."""
    truth, _ = random_set(2, crowds=False, difficult=True)

    def found(rows: np.ndarray) -> DetectionTable:
        return DetectionTable(
            seen=np.arange(truth.num_images),
            images=truth.images[rows],
            boxes=truth.boxes[rows],
            scores=np.linspace(1, 0.5, len(rows)),
            labels=truth.labels[rows].astype(np.int64),
        )

    everything = coco_figures(truth, found(np.arange(len(truth.boxes))))
    the_others = coco_figures(truth, found(np.flatnonzero(~truth.difficult)))
    assert everything.summary[0] == pytest.approx(1.0)
    without_the_first = [figure for number, figure in enumerate(everything.summary) if number not in (6, 7)]
    assert without_the_first == [figure for number, figure in enumerate(the_others.summary) if number not in (6, 7)]


def test_the_order_of_images_does_not_matter(random_set: RandomSet) -> None:
    truth, detections = random_set(3)
    order = np.argsort(-detections.images, kind="stable")
    assert coco_figures(truth, detections.rows(order)).summary == coco_figures(truth, detections).summary


@pytest.mark.parametrize("what", ["no detections", "no boxes", "no images"])
def test_nothing_to_compare_is_defined(random_set: RandomSet, what: str) -> None:
    truth, detections = random_set(0, num_images=0 if what == "no images" else 5)
    if what == "no detections":
        detections = detections.rows(np.zeros(len(detections), dtype=np.bool_))
    if what == "no boxes":
        nothing = np.zeros(0, dtype=np.int64)
        truth = replace(
            truth,
            offsets=np.zeros_like(truth.offsets),
            boxes=truth.boxes[nothing],
            labels=truth.labels[nothing],
            crowd=truth.crowd[nothing],
            difficult=truth.difficult[nothing],
            area=truth.area[nothing],
        )
    figures = coco_figures(truth, detections)
    expected = 0.0 if what == "no detections" else -1.0
    assert figures.summary[0] == figures.summary[8] == expected
    assert figures.ap.shape == (4,)
    assert set(figures.ap) <= {0.0, -1.0}
