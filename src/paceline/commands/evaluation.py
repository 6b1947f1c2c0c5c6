"""Evaluating a network on a data set: the loader, the network and the evaluator put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.commands.device import place
from paceline.evaluation.evaluator import Evaluator, evaluate
from paceline.evaluation.ground_truth import GroundTruth
from paceline.models.fusion import fuse
from paceline.parallel.gather import from_first, gather_detections

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn

    from paceline.batch import Batch
    from paceline.data.index import Index
    from paceline.evaluation.config import PostprocessConfig
    from paceline.evaluation.evaluator import Evaluation
    from paceline.records import EvaluationRecord


def ground_truth_of(index: Index) -> GroundTruth:
    """Hand the boxes of an index to the evaluation, crowds and difficult ones included."""
    return GroundTruth(
        num_images=len(index),
        num_classes=len(index.names),
        offsets=index.offsets,
        boxes=index.boxes,
        labels=index.labels,
        crowd=index.crowd,
        difficult=index.difficult,
        area=index.area,
        sizes=index.sizes,
    )


@torch.inference_mode()
def evaluate_network(
    network: nn.Module,
    batches: Iterable[Batch],
    index: Index,
    config: PostprocessConfig,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> Evaluation | None:
    """Run the network, with normalisations folded into its convolutions, over all batches and score it.

    With several ranks, `batches` are this rank's share; the first rank scores what all have found, the others get
    None. Images that have become unreadable since they were indexed count as images in which nothing was found.
    """
    folded = place(fuse(network), device)
    ground_truth = ground_truth_of(index)
    evaluator = Evaluator(config, ground_truth, index.names)
    for batch in batches:
        moved = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            predictions = folded(moved.network_input())
        if predictions is not None:  # a stage of a pipeline gives none, where the last one answers
            evaluator.add(moved, predictions)
    detections = gather_detections(evaluator.detections)
    return None if detections is None else evaluate(ground_truth, detections, index.names)


class Evaluations:
    """Evaluates the averaged network after an epoch, and keeps the best evaluation whole for the pictures."""

    def __init__(
        self,
        batches: Iterable[Batch],
        index: Index,
        config: PostprocessConfig,
        *,
        device: torch.device,
        amp_dtype: torch.dtype | None,
    ) -> None:
        """Take what `evaluate_network` takes, but for the network."""
        self._batches = batches
        self._index = index
        self._config = config
        self._device = device
        self._amp_dtype = amp_dtype
        self.best: Evaluation | None = None

    def __call__(self, network: nn.Module) -> EvaluationRecord:
        """Evaluate; returns the figures, on every rank those of all."""
        evaluation = evaluate_network(
            network, self._batches, self._index, self._config, device=self._device, amp_dtype=self._amp_dtype
        )
        if evaluation is not None and (self.best is None or evaluation.record.ap > self.best.record.ap):
            self.best = evaluation
        record = from_first(None if evaluation is None else evaluation.record)
        assert record is not None, "the first rank scores"
        return record
