"""Evaluation under the stopwatch: the fused network alone, and with decoding and suppression."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.commands.device import place
from paceline.evaluation.config import PostprocessConfig
from paceline.evaluation.postprocess import postprocess
from paceline.models.fusion import fuse
from paceline.planning.record import EvaluationBenchRecord
from paceline.planning.spread import Spread
from paceline.planning.stopwatch import Stopwatch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from paceline.batch import Batch

CLUSTERS, POINTS = 20, 50
"""Where the weights are fresh, whose scores would give no candidates: so many objects per image, each found at so many
neighbouring points, about what a trained network has above a score of 0.001."""


@torch.inference_mode()
def measure_evaluation(
    network: nn.Module,
    batch: Batch,
    *,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    is_trained: bool,
    limit_s: float,
    budget_s: float,
) -> EvaluationBenchRecord:
    """Time the evaluation of one batch.

    is_trained: whether the scores mean something; else suppression is given scores that are made up.
    limit_s: what the network alone takes at the limits of the device.
    """
    folded, config = place(fuse(network, for_autocast=amp_dtype), device), PostprocessConfig()

    def answer() -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
            outputs: tuple[Tensor, ...] = folded(batch.network_input())
        return outputs

    _, logits = answer()
    made_up = None if is_trained else _made_up_scores(logits)

    def evaluate() -> None:
        raw, logits = answer()
        postprocess((raw, logits if made_up is None else made_up), batch.size_hw, config)

    scores = logits if made_up is None else made_up
    candidates = (scores.float().sigmoid() > config.conf).sum().item() / len(batch)
    times = Stopwatch(device).in_turn({"network": answer, "all": evaluate}, budget_s=budget_s)
    return EvaluationBenchRecord(
        network_images_per_s=Spread.of(times["network"]).rate(len(batch)),
        images_per_s=Spread.of(times["all"]).rate(len(batch)),
        limit_images_per_s=len(batch) / limit_s,
        candidates=candidates,
    )


def _made_up_scores(logits_BAK: Tensor) -> Tensor:
    """Return logits of the same shape in which a few runs of points, that lie beside each other, find one class."""
    images, points, classes = logits_BAK.shape
    generator = torch.Generator().manual_seed(0)
    made_up = torch.full((images, points, classes), -20.0)
    length = min(POINTS, points)
    for image in range(images):
        starts = torch.randint(0, points - length + 1, (CLUSTERS,), generator=generator).tolist()
        labels = torch.randint(0, classes, (CLUSTERS,), generator=generator).tolist()
        for start, label in zip(starts, labels, strict=True):
            made_up[image, start : start + length, label] = 5 * torch.rand(length, generator=generator) - 4
    return made_up.to(logits_BAK)
