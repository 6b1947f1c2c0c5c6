"""Laws of the loss scale."""

from __future__ import annotations

import torch

from paceline.parallel.loss_scale import LossScale

FINITE, NOT_FINITE = torch.zeros(()), torch.ones(())


def test_it_halves_after_a_failure_and_doubles_after_a_row_of_successes() -> None:
    scale = LossScale(64.0, torch.device("cpu"), adaptive=True, growth_updates=3)
    values = []
    for event in (FINITE, FINITE, NOT_FINITE, FINITE, FINITE, FINITE, FINITE, FINITE, FINITE, NOT_FINITE, NOT_FINITE):
        scale.update(event)
        values.append(scale.value.item())
    assert values == [64, 64, 32, 32, 32, 64, 64, 64, 128, 64, 32]


def test_a_fixed_scale_stays() -> None:
    scale = LossScale(1.0, torch.device("cpu"), adaptive=False, growth_updates=1)
    for event in (FINITE, NOT_FINITE):
        scale.update(event)
    assert scale.value.item() == 1.0


def test_a_scale_that_is_saved_goes_on_as_if_nothing_had_happened() -> None:
    """Also within a row of successes; one that stays, or files from before, know of none."""
    undisturbed = LossScale(64.0, torch.device("cpu"), adaptive=True, growth_updates=3)
    for event in (NOT_FINITE, FINITE, FINITE):
        undisturbed.update(event)
    resumed = LossScale(64.0, torch.device("cpu"), adaptive=True, growth_updates=3)
    fixed = LossScale(1.0, torch.device("cpu"), adaptive=False)
    saved = undisturbed.saved()
    resumed.load(saved)
    fixed.load(saved)
    for scale in (undisturbed, resumed):
        scale.update(FINITE)
    assert undisturbed.value.item() == resumed.value.item() == 64.0
    assert fixed.value.item() == 1.0
    assert fixed.saved() == {}
    resumed.load({"loss_scale": torch.tensor(8.0)})
    resumed.update(FINITE)
    assert resumed.value.item() == 8.0
