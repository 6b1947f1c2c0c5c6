"""Kernels on trial under Triton's interpreter: all that a network and its loss start, together, beside torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.acceptance import compared
from paceline.training.precision import Precision

if TYPE_CHECKING:
    from collections import Counter

OF_ALL = {
    *("_statistics", "_settle_statistics", "_apply", "_gradient_sums", "_settle_sums", "_apply_gradient"),
    *("_spread", "_convolve", "_multiply", "_settle", "_pool", "_pool_gradient", "_double", "_halve"),
    *("_convolve_narrow", "_convolve_cells", "_weight_gradient", "_settle_weight", "_multiply_end", "_end_parts"),
    *("_convolve_joint", "_weight_parts", "_piece_gradients"),
    *("_decode", "_claim", "_pick", "_contest", "_target"),
    *("_sum_slots", "_sum_softplus", "_add_up", "_fill_gradients", "_slot_gradients"),
}
"""Names of kernels that every network starts."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "own"), [("yolo11n", "_trace_back"), ("yolov8n", "_map_gradient")])
def test_nothing_speaks_against_them(name: str, own: str, started: Counter[str]) -> None:
    torch.manual_seed(0)
    network = build_model(name, 3)
    criterion = DetectionLoss(LossConfig(), 3, strides=network.strides)
    assert compared(network, criterion, Precision(name="bf16"), images=1, side=64) == ""
    assert set(started) >= {*OF_ALL, own}
    norms = sum(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert started["_apply"] == norms, "each once, beside torch's"
    assert started["_apply_gradient"] == norms - 1, "the first convolution makes the gradient of its result itself"
