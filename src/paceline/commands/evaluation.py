"""Evaluating a network on a data set: the loader, the network and the evaluator put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

from paceline.commands.device import place
from paceline.evaluation.evaluator import Evaluator, evaluate
from paceline.evaluation.ground_truth import GroundTruth
from paceline.models.fusion import fuse
from paceline.parallel.gather import from_first, gather_detections

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import nn

    from paceline.batch import Batch
    from paceline.data.index import Index
    from paceline.evaluation.config import PostprocessConfig
    from paceline.evaluation.evaluator import Evaluation
    from paceline.parallel.gather import RankGroup
    from paceline.records import EvaluationRecord


PARTS_BESIDE = 4
"""In which the scoring beside a training is done: it then stands still for less than half as long at a time."""


class Batches(Protocol):
    """The batches of this rank, of which it is known how many there are; an `EvalLoader`, say."""

    def __len__(self) -> int:
        """Count them."""

    def __iter__(self) -> Iterator[Batch]:
        """Begin anew."""


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
    batches: Batches,
    index: Index,
    config: PostprocessConfig,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    group: RankGroup | None = None,
    stops: Callable[[], bool] = lambda: False,
    parts: int = 1,
) -> Evaluation | None:
    """Run the network, with normalisations folded into its convolutions, over all batches and score it.

    With several ranks, `batches` are this rank's share; the first rank scores what all have found, the others get
    None. Images that have become unreadable since they were indexed count as images in which nothing was found.

    group: of all ranks, for the ranks' detections; the world where it is None.
    stops: asked before each batch; where it says so on any rank, its rest is left out and nothing is scored at all.
    parts: see `coco_figures`.

    Raises RuntimeError where there are fewer batches than `batches` says: figures of a part would pass for the whole's.
    """
    folded = place(fuse(network, for_autocast=amp_dtype), device)
    ground_truth = ground_truth_of(index)
    evaluator = Evaluator(config, ground_truth, index.names)
    num_left = len(batches)
    for batch in batches:
        if stops():
            break
        num_left -= 1
        moved = batch.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            predictions = folded(moved.network_input())
        if predictions is not None:  # a stage of a pipeline gives none, where the last one answers
            evaluator.add(moved, predictions)
    if num_left and not stops():
        raise RuntimeError(f"the evaluation got all but {num_left} of its {len(batches)} batches: a part is not scored")
    # Those who stop come too, with nothing: others may wait for them, and figures of a part are nobody's.
    detections = gather_detections(None if num_left else evaluator.detections, group)
    return None if detections is None or stops() else evaluate(ground_truth, detections, index.names, parts=parts)


class Evaluations:
    """Evaluates the averaged network, after an epoch or apart, and keeps the best evaluation whole for the pictures."""

    def __init__(
        self,
        batches: Batches,
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
        record = from_first(self._evaluated(network))
        assert record is not None, "the first rank scores"
        return record

    def apart(self, group: RankGroup | None) -> Callable[[nn.Module, Callable[[], bool]], EvaluationRecord | None]:
        """Return what evaluates on another thread than the one that trains.

        It takes a network, and what says whether to stop, and returns the figures on the first rank, None on the
        others. group: of all ranks, for nothing else; None where this is the only one.
        """

        def evaluated(network: nn.Module, stops: Callable[[], bool]) -> EvaluationRecord | None:
            return self._evaluated(network, group=group, stops=stops, parts=PARTS_BESIDE)

        return evaluated

    def _evaluated(
        self,
        network: nn.Module,
        *,
        group: RankGroup | None = None,
        stops: Callable[[], bool] = lambda: False,
        parts: int = 1,
    ) -> EvaluationRecord | None:
        evaluation = evaluate_network(
            network,
            self._batches,
            self._index,
            self._config,
            device=self._device,
            amp_dtype=self._amp_dtype,
            group=group,
            stops=stops,
            parts=parts,
        )
        if evaluation is None:
            return None
        if self.best is None or evaluation.record.ap > self.best.record.ap:
            self.best = evaluation
        return evaluation.record
