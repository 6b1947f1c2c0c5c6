"""Laws of the moving average."""

from __future__ import annotations

import math

import torch
from torch import nn

from paceline.training.ema import Ema


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_it_equals_a_plain_average_written_out() -> None:
    watched = network()
    ema = Ema(watched, decay=0.9, ramp_updates=5)
    expected = {key: value.clone() for key, value in watched.state_dict().items()}
    for updates in range(1, 8):
        watched(torch.randn(2, 3, 6, 6))
        with torch.no_grad():
            for parameter in watched.parameters():
                parameter.add_(torch.randn_like(parameter))
        ema.update()
        decay = 0.9 * (1 - math.exp(-updates / 5))
        for key, value in watched.state_dict().items():
            if value.is_floating_point():
                expected[key] = decay * expected[key] + (1 - decay) * value
            else:
                expected[key] = value.clone()
    for key, value in ema.network.state_dict().items():
        torch.testing.assert_close(value, expected[key])


def test_the_average_is_in_eval_mode_asks_for_no_gradient_and_shares_nothing() -> None:
    watched = network()
    ema = Ema(watched)
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    before = ema.network[0].weight.clone()
    with torch.no_grad():
        watched[0].weight.zero_()
    torch.testing.assert_close(ema.network[0].weight, before)


def test_the_first_updates_follow_closely_and_later_ones_remember() -> None:
    ema = Ema(network())
    assert ema.decay(1) < 0.001
    assert 0.9998 < ema.decay(100_000) <= 0.9999
