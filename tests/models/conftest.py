"""Networks that several files of this folder look at, built once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from fill_rule import fill

from paceline.models.registry import build_model

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel


@pytest.fixture(scope="session", params=["yolov8n", "yolo11n"])
def filled_model(request: pytest.FixtureRequest) -> DetectionModel:
    """The smallest network of each family, filled by the rule, in float64 and evaluation mode: not to be changed."""
    return fill(build_model(request.param, 80)).to(torch.float64)
