"""Evaluator: takes a network's outputs batch by batch and says in the end how good they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from paceline.attributes import missing
from paceline.evaluation.coco_ap import CocoFigures, coco_figures
from paceline.evaluation.confusion import ConfusionMatrix, confusion_matrix
from paceline.evaluation.curves import BestThreshold, Curves, best_threshold, compute_curves
from paceline.evaluation.matching import match
from paceline.evaluation.postprocess import Detections, postprocess
from paceline.evaluation.table import DetectionTable
from paceline.letterbox import Letterbox
from paceline.records import ClassRecord, EvaluationRecord

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.evaluation.config import PostprocessConfig
    from paceline.evaluation.ground_truth import GroundTruth

CURVES_IOU = 0.5


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is known of a network on a set of images."""

    record: EvaluationRecord
    curves: Curves
    confusion: ConfusionMatrix
    detections: DetectionTable
    """In pixels of the image files, ordered by image."""

    if not TYPE_CHECKING:  # or else every name would pass the type checker

        def __getattr__(self, name: str) -> NoReturn:
            """Say what to write instead of an attribute that other YOLO trainers have."""
            raise missing(self, name)

    @property
    def ap(self) -> float:
        """AP50-95 by COCO's rules, in [0, 1]; -1 where no image has a box."""
        return self.record.ap

    @property
    def ap50(self) -> float:
        """AP at an IoU of .5."""
        return self.record.ap50

    @property
    def ap75(self) -> float:
        """AP at an IoU of .75."""
        return self.record.ap75

    def __repr__(self) -> str:
        """Say the figures, without the curves and the detections that they are made of."""
        return f"<Evaluation {self.record}>"


class Evaluator:
    """Collects the detections of every image of a data set, each exactly once, in any order.

    With several ranks each adds its own images; `detections` of all, joined by `DetectionTable.concatenate`, then go
    to `evaluate`.
    """

    def __init__(self, config: PostprocessConfig, ground_truth: GroundTruth, class_names: Sequence[str]) -> None:
        assert len(class_names) == ground_truth.num_classes
        self.config = config
        self.ground_truth = ground_truth
        self.class_names = tuple(class_names)
        self._shares: list[DetectionTable] = []
        self._seen = np.zeros(ground_truth.num_images, dtype=np.bool_)

    def add(self, batch: Batch, predictions: tuple[Tensor, ...]) -> Detections:
        """Take the raw outputs for a batch; its filling images (sample -1) are passed over.

        Returns the detections of the whole batch in pixels of the network's input, for pictures.
        """
        detections = postprocess(predictions, batch.size_hw, self.config)
        share = locate(detections, batch)
        assert not self._seen[share.seen].any(), "an image was evaluated twice"
        self._seen[share.seen] = True
        self._shares.append(share)
        return detections

    @property
    def detections(self) -> DetectionTable:
        """What was found so far, in pixels of the image files."""
        return DetectionTable.concatenate(self._shares)

    def finish(self) -> Evaluation:
        """Compute all figures, once every image has been added."""
        assert self._seen.all(), f"{int((~self._seen).sum())} images were never evaluated"
        return evaluate(self.ground_truth, self.detections, self.class_names)


def locate(detections: Detections, batch: Batch) -> DetectionTable:
    """Map detections of a batch back to the pixels of the image files, clipped to the image."""
    samples = batch.samples.cpu().numpy()
    sizes = batch.original_hw.cpu().numpy()
    count = detections.count.cpu().numpy()
    boxes = detections.boxes.cpu().numpy()
    filled = (np.arange(boxes.shape[1]) < count[:, None]) & (samples >= 0)[:, None]
    located = np.zeros(boxes.shape, dtype=np.float64)
    for image in np.flatnonzero(samples >= 0):
        height, width = sizes[image].tolist()
        letterbox = Letterbox.fit(height, width, *batch.size_hw)
        located[image] = letterbox.inverse(boxes[image].astype(np.float64))
    return DetectionTable(
        seen=samples[samples >= 0],
        images=np.repeat(samples, filled.sum(axis=1)),
        boxes=located[filled],
        scores=detections.scores.cpu().numpy()[filled].astype(np.float64),
        labels=detections.labels.cpu().numpy()[filled],
    )


def evaluate(
    ground_truth: GroundTruth, detections: DetectionTable, class_names: Sequence[str], *, parts: int = 1
) -> Evaluation:
    """Compute all figures of a table of detections; images that it has not seen count as images without any.

    parts: see `coco_figures`.
    """
    detections = detections.sorted_by_image()
    figures = coco_figures(ground_truth, detections, parts=parts)
    matching = match(ground_truth, detections, CURVES_IOU)
    best = best_threshold(ground_truth, detections, matching)
    return Evaluation(
        record=_record(ground_truth, figures, best, class_names),
        curves=compute_curves(ground_truth, detections, matching, figures),
        confusion=confusion_matrix(ground_truth, detections),
        detections=detections,
    )


def _record(
    ground_truth: GroundTruth, figures: CocoFigures, best: BestThreshold, class_names: Sequence[str]
) -> EvaluationRecord:
    ap, ap50, ap75, ap_small, ap_medium, ap_large, ar1, ar10, ar100, ar_small, ar_medium, ar_large = figures.summary
    present = ground_truth.num_boxes_of_class > 0
    return EvaluationRecord(
        ap=ap,
        ap50=ap50,
        ap75=ap75,
        ap_small=ap_small,
        ap_medium=ap_medium,
        ap_large=ap_large,
        ar1=ar1,
        ar10=ar10,
        ar100=ar100,
        ar_small=ar_small,
        ar_medium=ar_medium,
        ar_large=ar_large,
        precision=_mean(best.precision[present]),
        recall=_mean(best.recall[present]),
        f1=_mean(best.f1[present]),
        threshold=best.threshold,
        num_images=ground_truth.num_images,
        num_boxes=int(ground_truth.counts.sum()),
        per_class=tuple(
            ClassRecord(
                name=name,
                num_boxes=int(ground_truth.num_boxes_of_class[label]),
                num_images=int(ground_truth.num_images_of_class[label]),
                ap=float(figures.ap[label]),
                ap50=float(figures.ap50[label]),
                precision=float(best.precision[label]),
                recall=float(best.recall[label]),
                f1=float(best.f1[label]),
            )
            for label, name in enumerate(class_names)
        ),
    )


def _mean(figures: NDArray[np.float64]) -> float:
    """Mean, or -1 of none."""
    return float(figures.mean()) if len(figures) else -1.0
