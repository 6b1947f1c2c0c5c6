"""A network with the graph of the real ones and next to no work, for tests that compile it or train it whole."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.blocks import Concat, ConvUnit, Upsample
from paceline.models.graph import DetectionModel, Node
from paceline.models.heads import DetectionHead
from paceline.training.optim import OptimPlan
from paceline.training.trials import TrialSetting
from paceline.training.understudy import Cast

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.training.compile_cache import CompileCache
    from paceline.training.plan import StepPlan

NUM_CLASSES = 3
SGD = OptimPlan(name="SGD", lr0=0.01, momentum=0.9, warmup_momentum=0.9, warmup_bias_lr=0.01, weight_decay=0.0005)


def tiny() -> DetectionModel:
    """Three strides, a long skip, 8 channels."""
    torch.manual_seed(0)
    nodes = [
        Node(ConvUnit(3, 8, 3, 8), (-1,)),
        Node(ConvUnit(8, 8, 3, 2), (0,)),
        Node(Upsample(), (1,)),
        Node(Concat(), (0, 2)),
        Node(ConvUnit(8, 8, 3, 2), (1,)),
        Node(DetectionHead((16, 8, 8), NUM_CLASSES, depthwise=True), (3, 1, 4)),
    ]
    return DetectionModel(nodes, name="tiny", num_classes=NUM_CLASSES)


def setting(network: DetectionModel, compile_cache: Callable[[StepPlan], CompileCache] | None = None) -> TrialSetting:
    """What its steps are made of."""
    return TrialSetting(
        cast=Cast(
            network=network,
            criterion=DetectionLoss(LossConfig(), NUM_CLASSES),
            optimizer=SGD,
            freeze=0,
            clip=10.0,
        ),
        device=torch.device("cpu"),
        imgsz=64,
        boxes=3,
        padded_boxes=4,
        compile_cache=compile_cache,
    )
