from __future__ import annotations

import pytest
import torch

from paceline.models.registry import build_model
from paceline.models.weights import transfer


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_transfer_between_equals_is_a_copy(name: str) -> None:
    source, target = build_model(name, 3).state_dict(), build_model(name, 3)
    report = transfer(target, source)
    assert report.kept == tuple(source)
    assert report.left_out == report.missing == ()
    assert all(torch.equal(tensor, source[key]) for key, tensor in target.state_dict().items())


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_on_other_classes_only_the_last_class_convolutions_stay_behind(name: str) -> None:
    source, target = build_model(name, 5).state_dict(), build_model(name, 3)
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    head = len(target.nodes) - 1
    last = tuple(f"model.{head}.cv3.{level}.2.{part}" for level in range(3) for part in ("weight", "bias"))
    report = transfer(target, source)
    assert report.left_out == report.missing == last
    assert set(report.kept) == set(source) - set(last)
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[key] if key in last else source[key]), key


def test_what_does_not_fit_by_key_or_shape_is_left_out_and_named() -> None:
    target = build_model("yolov8n", 3)
    fitting = torch.full((16,), 2.5, dtype=torch.float16)
    report = transfer(
        target,
        {"model.0.bn.bias": fitting, "model.0.bn.weight": torch.ones(17), "model.99.bn.bias": torch.ones(16)},
    )
    assert report.kept == ("model.0.bn.bias",)
    assert report.left_out == ("model.0.bn.weight", "model.99.bn.bias")
    assert len(report.missing) == len(target.state_dict()) - 1
    assert torch.equal(target.get_parameter("model.0.bn.bias"), torch.full((16,), 2.5))


def test_fixed_parameters_stay_fixed_and_trained_ones_trainable() -> None:
    target = build_model("yolo11n", 3)
    before = {key: parameter.requires_grad for key, parameter in target.named_parameters()}
    transfer(target, build_model("yolo11n", 3).state_dict())
    assert {key: parameter.requires_grad for key, parameter in target.named_parameters()} == before
