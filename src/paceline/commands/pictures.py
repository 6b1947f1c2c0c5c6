"""The pictures of a run: what was trained on, what was found, and the curves."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.drawing.boxes import batch_picture, save_picture, truth_and_prediction_picture
from paceline.drawing.confusion import confusion_matrix
from paceline.drawing.curves import confidence_curves, pr_curves, run_curves
from paceline.letterbox import Letterbox

if TYPE_CHECKING:
    from collections.abc import Iterable

    from paceline.batch import Batch
    from paceline.data.index import Index
    from paceline.evaluation.evaluator import Evaluation
    from paceline.records import RunFolder

PICTURED_BATCHES = 3
PICTURED_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class RunPictures:
    """Draws into the `pictures` folder of a run."""

    run: RunFolder
    names: tuple[str, ...]

    @property
    def has_training_batches(self) -> bool:
        """Whether an earlier part of the run has drawn them."""
        return (self.run.pictures / f"train_batch{PICTURED_BATCHES}.jpg").exists()

    def training_batches(self, batches: Iterable[Batch]) -> None:
        """Draw the first batches as the network saw them, with their boxes."""
        for number, batch in enumerate(itertools.islice(batches, PICTURED_BATCHES), start=1):
            picture = batch_picture(
                batch.images.numpy(), batch.boxes.numpy(), batch.labels.numpy(), batch.valid.numpy(), self.names
            )
            save_picture(self.run.pictures / f"train_batch{number}.jpg", picture)

    def evaluation(self, evaluation: Evaluation, batches: Iterable[Batch], index: Index) -> None:
        """Draw predictions beside truths, curves over recall and confidence, and the confusion matrix."""
        self._predictions(evaluation, batches, index)
        curves, record, folder = evaluation.curves, evaluation.record, self.run.pictures
        ap50 = np.array([entry.ap50 for entry in record.per_class])
        pr_curves(folder / "pr_curve.png", curves.recalls, curves.precision_at_recall, ap50, self.names)
        best = (record.threshold, record.f1) if record.f1 >= 0 else None
        for stem, title, values, mark in (
            ("f1_curve", "F1", curves.f1, best),
            ("precision_curve", "Precision", curves.precision, None),
            ("recall_curve", "Recall", curves.recall, None),
        ):
            confidence_curves(
                folder / f"{stem}.png", curves.thresholds, values, self.names, f"{title} over confidence", title, mark
            )
        confusion_matrix(folder / "confusion_matrix.png", evaluation.confusion.counts, self.names)

    def curves(self) -> None:
        """Draw losses, AP, pace and seconds from the metrics file."""
        run_curves(self.run.pictures / "run.png", self.run.epochs(), self.run.path.name)

    def _predictions(self, evaluation: Evaluation, batches: Iterable[Batch], index: Index) -> None:
        for number, batch in enumerate(itertools.islice(batches, 2), start=1):
            samples = batch.samples.numpy()
            shown = np.flatnonzero(samples >= 0)[:PICTURED_IMAGES]
            boxes, scores, labels, count = _detections_in_network_pixels(evaluation, batch, shown)
            picture = truth_and_prediction_picture(
                batch.images.numpy()[shown],
                batch.boxes.numpy()[shown],
                batch.labels.numpy()[shown],
                batch.valid.numpy()[shown],
                boxes,
                scores,
                labels,
                count,
                self.names,
                captions=[index.path(int(sample)).name for sample in samples[shown]],
                least_score=max(evaluation.record.threshold, 0.05),
            )
            save_picture(self.run.pictures / f"predictions{number}.jpg", picture)


def _detections_in_network_pixels(
    evaluation: Evaluation, batch: Batch, shown: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Boxes BD4 (letterboxed), scores BD, labels BD and counts B of some images of a batch."""
    tables = [evaluation.detections.of_image(int(batch.samples[image])) for image in shown]
    most = max([len(table) for table in tables] + [1])
    boxes, scores = np.zeros((len(shown), most, 4)), np.zeros((len(shown), most))
    labels = np.zeros((len(shown), most), dtype=np.int64)
    for row, (image, table) in enumerate(zip(shown, tables, strict=True)):
        height, width = batch.original_hw[image].tolist()
        by_score = np.argsort(-table.scores, kind="stable")
        boxes[row, : len(table)] = Letterbox.fit(height, width, *batch.size_hw).forward(table.boxes[by_score])
        scores[row, : len(table)] = table.scores[by_score]
        labels[row, : len(table)] = table.labels[by_score]
    return boxes, scores, labels, np.array([len(table) for table in tables])
