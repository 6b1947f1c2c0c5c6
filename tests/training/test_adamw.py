"""AdamW with its rate on the device is torch's AdamW."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from weights import give_gradients, groups, parameters

from paceline.training.adamw import AdamW


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_adamw_while_the_rate_changes(dtype: torch.dtype) -> None:
    mine, theirs = parameters(dtype), parameters(dtype)
    ours = AdamW(groups(mine), lr=1.0, betas=(0.9, 0.999))
    reference = torch.optim.AdamW(groups(theirs), lr=torch.tensor(1.0), betas=(0.9, 0.999), fused=True)
    for number, lr in enumerate((0.1, 0.07, 0.05, 0.02, 0.01)):
        for group in (*ours.param_groups, *reference.param_groups):
            group["lr"].fill_(lr)
        give_gradients(mine, number)
        give_gradients(theirs, number)
        ours.step()
        reference.step()
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        assert ours.state[one].keys() == reference.state[other].keys()
        for name, value in ours.state[one].items():
            assert torch.equal(value, reference.state[other][name])
            assert value.stride() == reference.state[other][name].stride()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_update_that_is_left_out_changes_nothing(value: float) -> None:
    mine = parameters(torch.float32)
    optimizer = AdamW(groups(mine), lr=0.1, betas=(0.9, 0.999))
    give_gradients(mine, 0)
    optimizer.step()
    before = state_of(optimizer, mine)
    for parameter in mine:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(state_of(optimizer, mine), before, strict=True))
    optimizer.found_inf = torch.zeros(())
    give_gradients(mine, 1)
    optimizer.step()
    assert optimizer.state[mine[0]]["step"] == 2
    assert not torch.equal(mine[0], before[0])
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in mine)


def state_of(optimizer: AdamW, of: list[nn.Parameter]) -> list[Tensor]:
    return [value.detach().clone() for one in of for value in (one, *optimizer.state[one].values())]


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_step_does_not_load_the_compiler(name: str) -> None:
    """It takes more than a second of every process' start, and nothing of it is needed."""
    program = f"""
import sys, torch
from paceline.training.config import OptimConfig
from paceline.training.optim import build_optimizer, plan_optimizer, update
network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
plan = plan_optimizer(OptimConfig(optimizer="{name}"), num_classes=3, updates=100, effective_batch=64)
optimizer = build_optimizer(plan, network)
network(torch.randn(2, 3, 8, 8)).sum().backward()
update(optimizer, torch.zeros(()))
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
