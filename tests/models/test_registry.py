from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from fill_rule import images
from torch import nn

from paceline.models.catalogue import model_names
from paceline.models.registry import build_model

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [(name, 3) for name in model_names()]
    + [(name, k) for name in ("yolov8n", "yolo11n", "yolo11m") for k in (1, 40, 80)],
)
def test_every_network_takes_any_number_of_classes(name: str, num_classes: int) -> None:
    with torch.device("meta"):
        model = build_model(name, num_classes)
        boxes, scores = model(torch.empty(2, 3, 96, 160))
    assert (model.name, model.num_classes, model.reg_max, model.strides) == (name, num_classes, 16, (8, 16, 32))
    assert boxes.shape == (2, 315, 64)
    assert scores.shape == (2, 315, num_classes)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 224), (288, 96)])
@torch.no_grad()
def test_any_multiple_of_32_is_a_size(filled_model: DetectionModel, height: int, width: int) -> None:
    boxes, scores = filled_model(torch.rand(1, 3, height, width, dtype=torch.float64))
    num_points = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
    assert boxes.shape == (1, num_points, 64)
    assert scores.shape == (1, num_points, 80)


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(filled_model: DetectionModel) -> None:
    x = images(torch.float64)
    together = filled_model(x)
    for index in range(len(x)):
        for whole, alone in zip(together, filled_model(x[index : index + 1]), strict=True):
            torch.testing.assert_close(whole[index : index + 1], alone, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_memory_layout_changes_nothing(filled_model: DetectionModel) -> None:
    x = images(torch.float64)
    for ours, theirs in zip(
        filled_model(x.contiguous(memory_format=torch.channels_last)), filled_model(x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_the_seed_decides_the_weights(name: str) -> None:
    def state(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        return build_model(name, 5).state_dict()

    first, second, other = state(7), state(7), state(8)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.0.conv.weight"], other["model.0.conv.weight"])


ABSORBED = ("attn.pe.bn.bias", "attn.proj.bn.bias", "ffn.1.bn.bias")
"""Shifts of a whole channel, which the next norm takes out again: their gradient is zero but for rounding."""


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(name, 3).double().train()
    boxes, scores = model(images(torch.float64))
    (boxes.square().mean() + scores.square().mean()).backward()
    for key, parameter in model.named_parameters():
        if key.endswith("dfl.conv.weight"):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key
        largest = parameter.grad.abs().max()
        assert largest < 1e-12 if key.endswith(ABSORBED) else largest > 1e-9, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_of_the_weights_is_the_type_of_the_answer(dtype: torch.dtype) -> None:
    outputs = build_model("yolo11n", 3).to(dtype)(images(dtype))
    assert [output.dtype for output in outputs] == [dtype, dtype]


def test_training_and_evaluation_give_the_same_kind_of_answer() -> None:
    model = build_model("yolo11n", 3)
    with torch.no_grad():
        trained, evaluated = model.train()(images()), model.eval()(images())
    assert [part.shape for part in trained] == [part.shape for part in evaluated]


def test_norms_and_activations_are_those_of_the_family() -> None:
    norms = [module for module in build_model("yolo11n", 3).modules() if isinstance(module, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_the_whole_network_is_one_graph_for_the_compiler() -> None:
    torch.manual_seed(0)
    model = build_model("yolo11n", 3).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        for ours, theirs in zip(compiled(images()), model(images()), strict=True):
            assert torch.equal(ours, theirs)
