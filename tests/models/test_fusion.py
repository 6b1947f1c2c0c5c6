from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from fill_rule import images
from torch import nn

from paceline.models.blocks import ConvUnit
from paceline.models.fusion import fuse

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel


@torch.no_grad()
def test_fusing_changes_no_output(filled_model: DetectionModel) -> None:
    x = images(torch.float64)
    for ours, theirs in zip(fuse(filled_model)(x), filled_model(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_rounded_for_autocast_change_no_bit(filled_model: DetectionModel, dtype: torch.dtype) -> None:
    x = images(torch.float32)
    network = copy.deepcopy(filled_model).float()
    rounded = fuse(network, for_autocast=dtype)
    assert {module.weight.dtype for module in rounded.modules() if isinstance(module, nn.Conv2d)} == {dtype}
    with torch.autocast("cpu", dtype=dtype):
        for ours, theirs in zip(rounded(x), fuse(network)(x), strict=True):
            assert torch.equal(ours, theirs)


class Shifted(nn.Conv2d):
    """Somebody's own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Another number than a convolution gives, which no bias makes up for."""
        y: torch.Tensor = super().forward(x).abs()
        return y


@torch.no_grad()
def test_a_convolution_of_somebodys_own_keeps_its_norm() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(ConvUnit(4, 8), ConvUnit(8, 8))
    network[0].conv = Shifted(4, 8, 1, bias=False)
    parametrised = network[1].conv = nn.utils.parametrizations.weight_norm(network[1].conv)
    x = torch.randn(2, 4, 6, 6)
    network(x)  # statistics that are not those of the start
    fused = fuse(network)
    torch.testing.assert_close(fused(x), network.eval()(x))
    assert type(fused[1].conv) is type(parametrised)


def test_fusing_leaves_no_norm_and_leaves_the_original_alone(filled_model: DetectionModel) -> None:
    before = {key: tensor.clone() for key, tensor in filled_model.state_dict().items()}
    fused = fuse(filled_model)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    after = filled_model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_fusing_twice_is_fusing_once(filled_model: DetectionModel) -> None:
    once = fuse(filled_model)
    twice = fuse(once).state_dict()
    assert {key: tensor.shape for key, tensor in once.state_dict().items()} == {k: t.shape for k, t in twice.items()}


def test_a_fused_model_is_in_evaluation_mode_whatever_the_original_was(filled_model: DetectionModel) -> None:
    filled_model.train()
    try:
        assert not fuse(filled_model).training
        assert filled_model.training
    finally:
        filled_model.eval()
