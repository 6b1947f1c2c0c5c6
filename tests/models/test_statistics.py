from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.models.registry import build_model
from paceline.models.statistics import count_gflops, count_parameters


def test_operations_of_a_convolution_are_counted_by_hand() -> None:
    convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
    assert count_gflops(convolution, 64) == pytest.approx(2 * 32 * 32 * 8 * 3 * 9 / 1e9)
    assert count_parameters(convolution) == 8 * 3 * 9


def test_groups_divide_the_operations() -> None:
    whole, grouped = nn.Conv2d(3, 9, 3, padding=1), nn.Conv2d(3, 9, 3, padding=1, groups=3)
    assert count_gflops(grouped, 32) == pytest.approx(count_gflops(whole, 32) / 3)


def test_operations_grow_with_the_area() -> None:
    with torch.device("meta"):
        model = build_model("yolo11n", 80)
    assert count_gflops(model, 640) == pytest.approx(4 * count_gflops(model, 320), rel=1e-12)


def test_images_of_one_cell_are_counted_too() -> None:
    with torch.device("meta"):
        model = build_model("yolo11n", 80).train()
    assert count_gflops(model, 32) == pytest.approx(count_gflops(model, 640) / 400, rel=1e-12)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = build_model("yolov8n", 3).train()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    count_gflops(model, 64)
    assert model.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
