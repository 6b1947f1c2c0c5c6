"""SGD with its rates on the device is torch's SGD with numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from weights import give_gradients, groups, parameters

from paceline.training.sgd import Sgd

RATES = [(0.1, 0.8), (0.07, 0.85), (0.05, 0.9), (0.02, 0.937), (0.01, 0.937)]


@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_sgd_while_rates_and_momentum_change(nesterov: bool) -> None:
    mine, theirs = parameters(), parameters()
    ours = Sgd(groups(mine), lr=1.0, momentum=0.5, nesterov=nesterov)
    reference = torch.optim.SGD(groups(theirs), lr=1.0, momentum=0.5, nesterov=nesterov)
    for number, (lr, momentum) in enumerate(RATES):
        for group, other in zip(ours.param_groups, reference.param_groups, strict=True):
            group["lr"].fill_(lr)
            group["momentum"].fill_(momentum)
            other["lr"], other["momentum"] = lr, momentum
        give_gradients(mine, number)
        give_gradients(theirs, number)
        ours.step()
        reference.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)  # the rates are float32
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        buffer, expected = ours.state[one]["momentum_buffer"], reference.state[other]["momentum_buffer"]
        torch.testing.assert_close(buffer, expected, rtol=1e-6, atol=1e-7)
        assert buffer.stride() == one.stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_left_out_changes_nothing(value: float) -> None:
    mine = parameters()
    optimizer = Sgd(groups(mine), lr=0.1, momentum=0.9)
    give_gradients(mine, 0)
    optimizer.step()
    before = state_of(optimizer, mine)
    for parameter in mine:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for one, other in zip(state_of(optimizer, mine), before, strict=True):
        assert torch.equal(one, other)
    optimizer.found_inf = torch.zeros(())
    give_gradients(mine, 1)
    optimizer.step()
    assert not torch.equal(mine[0], before[0])


def state_of(optimizer: Sgd, of: list[nn.Parameter]) -> list[Tensor]:
    return [value.detach().clone() for value in (*of, *(optimizer.state[one]["momentum_buffer"] for one in of))]
