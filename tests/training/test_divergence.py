"""Divergence: a training whose gradients are not finite any more ends soon, however long it went well before."""

from __future__ import annotations

import pytest

from paceline.errors import UserError
from paceline.training.divergence import MOST_LOST, Divergence


def told(lost_per_epoch: list[tuple[int, int]]) -> None:
    """Tell of the updates that each epoch lost, out of how many."""
    divergence = Divergence()
    for lost, updates in lost_per_epoch:
        divergence.count(lost, updates)


def test_a_late_divergence_is_seen_in_its_epoch() -> None:
    with pytest.raises(UserError, match="diverged: of the last gradients 100 were not finite"):
        told([(0, 100)] * 100 + [(100, 100)])


def test_small_epochs_add_up() -> None:
    told([(0, 4)] * 9 + [(4, 4)] * (MOST_LOST // 4 - 1))
    with pytest.raises(UserError, match="diverged"):
        told([(0, 4)] * 9 + [(4, 4)] * (MOST_LOST // 4))


def test_a_scale_that_is_found_anew_now_and_then_is_no_divergence() -> None:
    told([(3, 4), (0, 4)] * 50)
    told([(10, 100)] * 50)
