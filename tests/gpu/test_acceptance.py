"""Kernels on trial on a GPU: nothing speaks against ours, whatever the network and the precision."""

from __future__ import annotations

import pytest
import torch

from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.acceptance import compared
from paceline.training.precision import Precision

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["yolo11n", "yolo11m", "yolov8n"])
def test_nothing_speaks_against_the_kernels(name: str, precision: str) -> None:
    torch.manual_seed(0)
    network = build_model(name, 80).cuda()
    criterion = DetectionLoss(LossConfig(), 80, strides=network.strides)
    assert compared(network, criterion, Precision.named(precision)) == ""
