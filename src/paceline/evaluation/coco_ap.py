"""COCO's average precision and recall, computed by faster-coco-eval."""

from __future__ import annotations

import gc
import itertools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.evaluation.accumulation import Matches, accumulate
from paceline.evaluation.ground_truth import GroundTruth
from paceline.evaluation.table import DetectionTable, xywh

if TYPE_CHECKING:
    from collections.abc import Iterator

    from faster_coco_eval import COCO
    from numpy.typing import NDArray

__all__ = ["CocoFigures", "GroundTruth", "coco_figures"]

MAX_DETECTIONS = 100
"""Detections of one image and class that COCO's figures look at."""
BEYOND_EVERY_RANGE = 1e12
"""Area in square pixels that lies outside all of COCO's size ranges, "all" included (it ends at 1e10): such a box is
matched like any other and then counts neither way, which is what a difficult box wants."""
MOST_OF_A_PART = 250_000
"""Pairs of image and class, boxes and detections that are scored at once, of some 1.5 kB each; a class that has more is
scored by parts of its images."""


@dataclass(frozen=True, kw_only=True)
class CocoFigures:
    """COCO's figures, -1 where undefined."""

    summary: tuple[float, ...]
    """The twelve, in COCO's order: AP, AP50, AP75, AP small, medium, large, AR 1, 10, 100, AR small, medium, large."""
    ap: NDArray[np.float64]
    """K, AP of each class."""
    ap50: NDArray[np.float64]
    """K, AP of each class at IoU .5."""
    recalls: NDArray[np.float64]
    """101 recalls from 0 to 1."""
    precision50: NDArray[np.float64]
    """KR, precision at those recalls at IoU .5."""


def coco_figures(ground_truth: GroundTruth, detections: DetectionTable, *, parts: int = 1) -> CocoFigures:
    """Compute COCO's figures of boxes: equal to pycocotools' on the same detections.

    Detections count in the order of the images in the index; those of equal score in the table's order.

    parts: the library's compiled part holds Python's lock; for the classes in several parts it does so for as much
        less at a time, and another thread can go on in between. Where there is much to score there are more parts, for
        the memory. The figures are the same.
    """
    from faster_coco_eval import COCOeval_faster  # a fifth of a second that the first step should not wait for

    with _no_collection():
        evaluated = [
            _evaluated(classes, ground_truth, boxes, found)
            if ground_truth.num_images + len(boxes) + len(found) <= 2 * MOST_OF_A_PART
            else _evaluated_by_images(classes, ground_truth, boxes, found)
            for classes, boxes, found in _parts(ground_truth, _best_of_each(detections), parts)
        ]
        evaluation = COCOeval_faster(iouType="bbox")
        for name, axis in (("precision", 2), ("recall", 1)):  # the axis of classes
            evaluation.eval[name] = np.concatenate([each[name] for each in evaluated], axis=axis)
        evaluation.summarize()
    # thresholds of IoU x recalls x classes x areas (the first is "all") x numbers of detections (the last is 100)
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    return CocoFigures(
        summary=tuple(float(figure) for figure in evaluation.stats[:12]),
        ap=_mean_of_defined(precision),
        ap50=_mean_of_defined(precision[:1]),
        recalls=np.asarray(evaluation.params.recThrs, dtype=np.float64),
        precision50=precision[0].T.copy(),
    )


def _parts(
    ground_truth: GroundTruth, detections: DetectionTable, parts: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], DetectionTable]]:
    """Give the classes in parts, each with the rows of its boxes and its detections.

    The library keeps more than a kilobyte per image and class, per box and per detection: a part has more of these than
    twice `MOST_OF_A_PART` only where it is a single class. There are about `parts` of them or more, of about equal
    work.
    """
    num_classes = ground_truth.num_classes
    boxes, rows = np.argsort(ground_truth.labels, kind="stable"), np.argsort(detections.labels, kind="stable")
    num_boxes = np.bincount(ground_truth.labels, minlength=num_classes)
    num_rows = np.bincount(detections.labels, minlength=num_classes)
    work = ground_truth.num_images + num_boxes + num_rows
    most = max(min(-(-int(work.sum()) // max(parts, 1)), MOST_OF_A_PART), 1)
    cuts = np.flatnonzero(np.diff((np.cumsum(work) - work) // most)) + 1
    huge = np.flatnonzero(work > MOST_OF_A_PART)
    cuts = np.union1d(cuts, np.concatenate([huge, huge + 1]))
    cuts = cuts[(cuts > 0) & (cuts < num_classes)]
    for part, its_boxes, its_rows in zip(
        np.split(np.arange(num_classes), cuts),
        np.split(boxes, np.cumsum(num_boxes)[cuts - 1]),
        np.split(rows, np.cumsum(num_rows)[cuts - 1]),
        strict=True,
    ):
        yield part, np.sort(its_boxes), detections.rows(np.sort(its_rows))


def _evaluated(
    classes: NDArray[np.int64], ground_truth: GroundTruth, boxes: NDArray[np.int64], detections: DetectionTable
) -> dict[str, NDArray[np.float64]]:
    """Let the library score a part of the classes, given its boxes (rows of the ground truth) and its detections.

    Returns `precision` (thresholds of IoU x recalls x classes x areas x numbers of detections) and `recall` (without
    recalls).
    """
    from faster_coco_eval import COCOeval_faster

    images = range(ground_truth.num_images)
    truth = _coco(_annotations_of_truth(ground_truth, boxes), images, classes)
    found = _coco(_annotations_of_detections(detections), images, classes)
    evaluation = COCOeval_faster(truth, found, iouType="bbox", extra_calc=False)
    evaluation.evaluate()
    evaluation.accumulate()
    return {name: np.asarray(evaluation.eval[name]) for name in ("precision", "recall")}


def _evaluated_by_images(
    classes: NDArray[np.int64], ground_truth: GroundTruth, boxes: NDArray[np.int64], detections: DetectionTable
) -> dict[str, NDArray[np.float64]]:
    """Score a single class like `_evaluated`, of which the library matches a part of the images at a time."""
    from faster_coco_eval.core.cocoeval import Params

    assert len(classes) == 1
    num_images = ground_truth.num_images
    work = 1 + np.bincount(ground_truth.images[boxes], minlength=num_images)
    work += np.bincount(detections.images, minlength=num_images)
    edges = [0, *(np.flatnonzero(np.diff(np.cumsum(work) // MOST_OF_A_PART)) + 1).tolist(), num_images]
    matches = []
    for first, end in itertools.pairwise(edges):
        its_boxes = boxes[slice(*np.searchsorted(ground_truth.images[boxes], (first, end)))]
        rows = np.arange(*np.searchsorted(detections.images, (first, end)))
        matches.append(_matched(classes, ground_truth, its_boxes, detections.rows(rows), range(first, end)))
    params = Params(iouType="bbox")
    precision, recall = accumulate(Matches.join(matches), np.asarray(params.recThrs), params.maxDets)
    return {"precision": precision[:, :, None], "recall": recall[:, None]}


def _matched(
    classes: NDArray[np.int64],
    ground_truth: GroundTruth,
    boxes: NDArray[np.int64],
    detections: DetectionTable,
    images: range,
) -> Matches:
    """Let the library match the boxes and detections of some images, of a single class."""
    from faster_coco_eval import COCOeval_faster

    truth = _coco(_annotations_of_truth(ground_truth, boxes), images, classes)
    found = _coco(_annotations_of_detections(detections), images, classes)
    evaluation = COCOeval_faster(truth, found, iouType="bbox", extra_calc=False, separate_eval=True)
    evaluation.evaluate()
    states = (state.__getstate__() for state in evaluation._evalImgs_cpp)  # the only way in
    return Matches.of(states, len(images), len(evaluation.params.areaRng), len(evaluation.params.iouThrs))


def _mean_of_defined(precision_TRK: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over thresholds and recalls: K. A class without boxes has -1 everywhere, and stays -1."""
    mean: NDArray[np.float64] = precision_TRK.mean(axis=(0, 1))
    return mean


def _best_of_each(detections: DetectionTable) -> DetectionTable:
    """Keep the detections that can count: the best of each image and class, in the order of the table by image."""
    detections = detections.sorted_by_image()
    order = np.lexsort((-detections.scores, detections.labels, detections.images))
    images, labels = detections.images[order], detections.labels[order]
    starts = np.ones(len(order), dtype=np.bool_)
    starts[1:] = (images[1:] != images[:-1]) | (labels[1:] != labels[:-1])
    place = np.arange(len(order))
    rank = place - np.maximum.accumulate(np.where(starts, place, 0))
    return detections.rows(np.sort(order[rank < MAX_DETECTIONS]))


def _annotations_of_truth(ground_truth: GroundTruth, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    area = np.where(ground_truth.difficult[rows], BEYOND_EVERY_RANGE, ground_truth.area[rows])
    columns = (
        ground_truth.images[rows].tolist(),
        ground_truth.labels[rows].tolist(),
        xywh(ground_truth.boxes[rows]).tolist(),
        area.tolist(),
        ground_truth.crowd[rows].astype(np.int64).tolist(),
    )
    return [
        {"id": row, "image_id": image, "category_id": label, "bbox": box, "area": size, "iscrowd": crowd}
        for row, (image, label, box, size, crowd) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _annotations_of_detections(detections: DetectionTable) -> list[dict[str, Any]]:
    boxes = xywh(detections.boxes)
    columns = (
        detections.images.tolist(),
        detections.labels.tolist(),
        boxes.tolist(),
        (boxes[:, 2] * boxes[:, 3]).tolist(),
        detections.scores.tolist(),
    )
    return [
        {"id": row, "image_id": image, "category_id": label, "bbox": box, "area": size, "iscrowd": 0, "score": score}
        for row, (image, label, box, size, score) in enumerate(zip(*columns, strict=True), start=1)
    ]


def _coco(annotations: list[dict[str, Any]], images: range, classes: NDArray[np.int64]) -> COCO:
    from faster_coco_eval import COCO

    table = COCO()
    table.dataset = {
        "images": [{"id": image} for image in images],
        "categories": [{"id": label, "name": str(label)} for label in classes.tolist()],
        "annotations": annotations,
    }
    table.createIndex()
    return table


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: it would walk through millions of dicts, none of which is in a cycle."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
