"""Laws of the schedule."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from paceline.training.config import OptimConfig
from paceline.training.optim import plan_optimizer
from paceline.training.recipe import Recipe
from paceline.training.schedule import Schedule


def schedule(config: OptimConfig, *, batch: int = 16, steps_per_epoch: float = 100.0) -> Schedule:
    plan = plan_optimizer(config, num_classes=3, updates=20_000, effective_batch=64)
    return Schedule.from_config(config, plan, batch=batch, steps_per_epoch=steps_per_epoch)


@pytest.mark.parametrize("cosine", [False, True])
def test_the_rate_starts_at_zero_peaks_after_the_warm_up_and_ends_at_its_share(cosine: bool) -> None:
    config = OptimConfig(optimizer="SGD", lr0=0.01, lrf=0.1, cos_lr=cosine)
    made = schedule(config)
    rates = [made.rates(epoch / 10, 50).lr for epoch in range(501)]
    assert rates[0] == 0.0
    assert max(range(501), key=rates.__getitem__) == pytest.approx(30, abs=1)
    assert rates[-1] == pytest.approx(0.001)
    after = rates[31:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))


def test_sgd_biases_warm_down_and_momentum_warms_up() -> None:
    made = schedule(OptimConfig(optimizer="SGD"))
    assert made.rates(0, 50).bias_lr == pytest.approx(0.1)
    assert made.rates(0, 50).momentum == pytest.approx(0.8)
    warm = made.rates(3, 50)
    assert warm.bias_lr == pytest.approx(warm.lr)
    assert warm.momentum == pytest.approx(0.937)


def test_adamw_biases_warm_up_from_zero_like_all_others() -> None:
    made = schedule(OptimConfig(optimizer="AdamW", lr0=0.001))
    for epoch in (0.0, 0.7, 2.0, 10.0):
        assert made.rates(epoch, 50).bias_lr == pytest.approx(made.rates(epoch, 50).lr)


def test_the_momentum_of_adamw_never_changes() -> None:
    for config in (OptimConfig(optimizer="AdamW", momentum=0.85), OptimConfig(optimizer="auto")):
        plan = plan_optimizer(config, num_classes=3, updates=1000, effective_batch=64)
        made = Schedule.from_config(config, plan, batch=16, steps_per_epoch=100.0)
        assert {made.rates(epoch, 50).momentum for epoch in (0.0, 0.7, 2.0, 10.0, 50.0)} == {plan.momentum}


def test_a_small_set_warms_up_over_at_least_a_hundred_steps() -> None:
    assert schedule(OptimConfig(), steps_per_epoch=10).warmup_epochs == pytest.approx(10)
    assert schedule(OptimConfig(), steps_per_epoch=1000).warmup_epochs == pytest.approx(3)
    assert schedule(OptimConfig(warmup_epochs=0), steps_per_epoch=10).warmth(0) == 1.0


@pytest.mark.parametrize(("batch", "expected"), [(1, 64), (16, 4), (48, 1), (64, 1), (256, 1)])
def test_accumulation_reaches_the_nominal_batch(batch: int, expected: int) -> None:
    made = schedule(OptimConfig(), batch=batch)
    assert made.accumulation(0) == 1
    assert made.accumulation(100) == expected
    counts = [made.accumulation(epoch / 10) for epoch in range(40)]
    assert counts == sorted(counts)


def test_auto_takes_adamw_for_short_runs_and_sgd_for_long_ones() -> None:
    short = Recipe.of(OptimConfig(), num_images=205, num_classes=3, batch=16, epochs=50)
    assert short.plan.name == "AdamW"
    assert short.plan.lr0 == pytest.approx(0.001429)
    assert short.plan.momentum == 0.9
    long = Recipe.of(OptimConfig(), num_images=118_287, num_classes=80, batch=64, epochs=100)
    assert long.plan.name == "SGD"
    assert long.plan.lr0 == 0.01


def test_the_decay_per_image_does_not_depend_on_the_batch() -> None:
    config = OptimConfig(optimizer="SGD")
    decays = {
        batch: Recipe.of(config, num_images=10_000, num_classes=3, batch=batch, epochs=10).plan.weight_decay
        for batch in (16, 64, 128)
    }
    assert decays[16] == decays[64] == config.weight_decay
    assert decays[128] == 2 * config.weight_decay


def test_a_named_optimiser_keeps_the_rates_of_the_options() -> None:
    config = OptimConfig(optimizer="AdamW", lr0=0.003, momentum=0.85)
    plan = plan_optimizer(config, num_classes=3, updates=10, effective_batch=64)
    assert (plan.lr0, plan.momentum) == (0.003, 0.85)
    assert dataclasses.replace(plan, lr0=1.0).lr0 == 1.0
