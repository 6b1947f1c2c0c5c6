from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from paceline.models.blocks import C2PSA, PSA, SPPF, Attention, Bottleneck, C2f, C3k, C3k2, ConvUnit, DepthwiseConv
from paceline.models.convolution import Convolution
from paceline.models.families.scale import Scale
from paceline.parallel.norms import BatchStatistics

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "DepthwiseConv": lambda: DepthwiseConv(64),
    "Bottleneck": lambda: Bottleneck(64, 32, residual=True),
    "C2f": lambda: C2f(64, 64, 2, residual=False),
    "C3k": lambda: C3k(64),
    "C3k2": lambda: C3k2(64, 64, 2, c3k=True),
    "SPPF": lambda: SPPF(64, 64),
    "PSA": lambda: PSA(64),
    "C2PSA": lambda: C2PSA(64, 1),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=BLOCKS.values(), ids=BLOCKS)
def block(request: pytest.FixtureRequest) -> nn.Module:
    return request.param().double().eval()


def pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_blocks_keep_the_size_of_the_map(block: nn.Module) -> None:
    x = pixels(1, 64, 5, 7)
    assert block(x).shape == x.shape


def test_memory_layout_changes_nothing_but_the_layout(block: nn.Module) -> None:
    x = pixels(2, 64, 4, 6)
    y = block(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(y, block(x), rtol=1e-12, atol=1e-12)
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_mirrored_weights_of_a_mirrored_map_give_the_mirrored_answer(block: nn.Module) -> None:
    x = pixels(1, 64, 4, 6)
    expected = block(x).flip(3)
    convolutions = [module for module in block.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.weight.data = convolution.weight.data.flip(3)
    torch.testing.assert_close(block(x.flip(3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2)])
def test_a_conv_unit_is_convolution_norm_and_silu(kernel: int, stride: int) -> None:
    unit = ConvUnit(3, 8, kernel, stride).double()
    x = pixels(4, 3, 8, 8)
    convolved = nn.functional.conv2d(x, unit.conv.weight, stride=stride, padding=kernel // 2)
    mean, variance = convolved.mean((0, 2, 3), keepdim=True), convolved.var((0, 2, 3), keepdim=True, correction=0)
    normed = (convolved - mean) / torch.sqrt(variance + 1e-3)
    torch.testing.assert_close(unit.train()(x), normed * normed.sigmoid())
    torch.testing.assert_close(unit.get_buffer("bn.running_mean"), 0.03 * mean.flatten())


class Doubled(Convolution):
    """Somebody's own, which knows nothing of moments."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Twice what it would give."""
        y: torch.Tensor = 2 * super().forward(x)
        return y


def test_a_convolution_of_somebodys_own_is_normalised_by_what_it_gives() -> None:
    """It is asked for no moments, which would be those of the one it is made of."""
    torch.manual_seed(0)
    unit = ConvUnit(4, 8).train()
    BatchStatistics(unit)
    x = torch.randn(2, 4, 6, 6)
    usual = unit(x)
    own = Doubled(4, 8, 1)
    own.weight = unit.conv.weight
    unit.conv = own
    found = unit(x)
    torch.testing.assert_close(found, usual, rtol=1e-2, atol=1e-2)
    assert not torch.equal(found, usual), "the norm's eps counts for less"
    norm: Any = unit.bn
    torch.testing.assert_close(norm.latest[0], 2 * unit.conv._conv_forward(x, own.weight, None).mean((0, 2, 3)))


def test_attention_equals_the_sum_over_all_cells_written_out() -> None:
    attention = Attention(128, num_heads=2).double().eval()
    x = pixels(2, 128, 3, 5)
    qkv, per_head = attention.qkv(x).flatten(2), 32 + 32 + 64
    answers, values = [], []
    for head in range(2):
        q, k, v = qkv[:, head * per_head : (head + 1) * per_head].split((32, 32, 64), dim=1)
        answer = torch.zeros_like(v)
        for cell in range(15):
            weights = ((q[:, :, cell, None] * k).sum(1) / 32**0.5).softmax(dim=1)
            answer[:, :, cell] = (v * weights[:, None]).sum(2)
        answers.append(answer)
        values.append(v)
    answer, value = torch.cat(answers, 1).view_as(x), torch.cat(values, 1).view_as(x)
    torch.testing.assert_close(attention(x), attention.proj(answer + attention.pe(value)))


def test_attention_does_not_care_about_the_order_of_cells_without_its_position_term() -> None:
    attention = Attention(64, num_heads=1).double().eval()
    nn.init.zeros_(attention.pe.conv.weight)
    x = pixels(1, 64, 4, 4)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    shuffled = x.flatten(2)[:, :, order].view_as(x)
    torch.testing.assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[:, :, order])


def test_activation_leaves_its_input_alone() -> None:
    x = pixels(1, 4, 2, 2)
    before = x.clone()
    ConvUnit(4, 4).double().act(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("base", "channels"), [(64, 48), (512, 384), (1024, 576), (5, 8)])
def test_channels_are_bounded_scaled_and_rounded_up(base: int, channels: int) -> None:
    assert Scale(depth=0.67, width=0.75, max_channels=768).channels(base) == channels


@pytest.mark.parametrize(
    ("depth", "base", "repeats"), [(0.33, 3, 1), (0.33, 6, 2), (0.67, 6, 4), (0.5, 1, 1), (1.0, 2, 2)]
)
def test_repeats_are_scaled_and_at_least_one(depth: float, base: int, repeats: int) -> None:
    assert Scale(depth=depth, width=1.0, max_channels=512).repeats(base) == repeats
