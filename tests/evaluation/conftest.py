"""Random data sets with detections, hard in every way that evaluation knows, and the reference to compare with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from paceline.evaluation.ground_truth import GroundTruth
from paceline.evaluation.table import DetectionTable

RandomSet = Callable[..., tuple[GroundTruth, DetectionTable]]
Pycocotools = Callable[..., COCOeval]


def _random_boxes(random: np.random.Generator, number: int) -> np.ndarray:
    """Boxes of all of COCO's sizes within a page of 400 px."""
    corner = random.uniform(0, 300, (number, 2))
    side = np.exp(random.uniform(np.log(8), np.log(150), (number, 2)))
    return np.concatenate((corner, corner + side), axis=1)


def _random_set(
    seed: int,
    *,
    num_images: int = 12,
    num_classes: int = 4,
    max_boxes: int = 8,
    max_detections: int = 30,
    crowds: bool = True,
    difficult: bool = False,
) -> tuple[GroundTruth, DetectionTable]:
    """Images without boxes or detections, a class without boxes, crowds, areas below the boxes', scores that tie."""
    random = np.random.default_rng(seed)
    num_boxes = random.integers(0, max_boxes + 1, num_images) * (random.random(num_images) > 0.2)
    offsets = np.concatenate(([0], np.cumsum(num_boxes)))
    total = int(offsets[-1])
    boxes = _random_boxes(random, total)
    truth = GroundTruth(
        num_images=num_images,
        num_classes=num_classes,
        offsets=offsets,
        boxes=boxes,
        labels=random.integers(0, max(num_classes - 1, 1), total).astype(np.int32),
        crowd=(random.random(total) < 0.15) & crowds,
        difficult=(random.random(total) < 0.2) & difficult,
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) * random.uniform(0.4, 1.0, total),
        sizes=np.full((num_images, 2), 400, dtype=np.int32),
    )
    num_found = random.integers(0, max_detections + 1, num_images) * (random.random(num_images) > 0.1)
    images = np.repeat(np.arange(num_images), num_found)
    found = _random_boxes(random, len(images))
    labels = random.integers(0, num_classes, len(images))
    near = random.random(len(images)) < 0.6
    for row in np.flatnonzero(near & (num_boxes[images] > 0)):
        source = random.integers(offsets[images[row]], offsets[images[row] + 1])
        found[row] = boxes[source] + random.normal(0, 0.06, 4) * np.tile(boxes[source, 2:] - boxes[source, :2], 2)
        labels[row] = truth.labels[source] if random.random() < 0.9 else labels[row]
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
    scores = np.round(random.random(len(images)), 1 if seed % 2 else 4)
    detections = DetectionTable(
        seen=np.arange(num_images), images=images, boxes=found, scores=scores, labels=labels.astype(np.int64)
    )
    return truth, detections


@pytest.fixture(scope="session")
def random_set() -> RandomSet:
    return _random_set


def _coco_dataset(truth: GroundTruth) -> dict[str, Any]:
    corner, side = truth.boxes[:, :2], truth.boxes[:, 2:] - truth.boxes[:, :2]
    return {
        "images": [{"id": i, "height": int(h), "width": int(w)} for i, (h, w) in enumerate(truth.sizes)],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(truth.num_classes)],
        "annotations": [
            {
                "id": row + 1,
                "image_id": int(truth.images[row]),
                "category_id": int(truth.labels[row]),
                "bbox": [*corner[row].tolist(), *side[row].tolist()],
                "area": float(truth.area[row]),
                "iscrowd": int(truth.crowd[row]),
            }
            for row in range(len(truth.boxes))
        ],
    }


def _pycocotools_evaluation(truth: GroundTruth | dict[str, Any], results: list[dict[str, Any]]) -> COCOeval:
    """What pycocotools makes of a list of results, given our ground truth or an annotation file's content."""
    dataset = _coco_dataset(truth) if isinstance(truth, GroundTruth) else truth
    with contextlib.redirect_stdout(io.StringIO()):
        annotations = COCO()
        annotations.dataset = dataset
        annotations.createIndex()
        evaluation = COCOeval(annotations, annotations.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


@pytest.fixture(scope="session")
def pycocotools_evaluation() -> Pycocotools:
    return _pycocotools_evaluation
