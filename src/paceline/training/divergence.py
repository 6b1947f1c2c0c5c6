"""Divergence: when updates that were left out, as their gradients were not finite, mean that a training is lost."""

from __future__ import annotations

from paceline.errors import UserError

MOST_LOST = 20
"""Updates left out, in epochs in a row that lose half of theirs or more, of a training that has diverged."""


class DivergedError(UserError):
    """A training whose gradients are finite no more."""


class Divergence:
    """Counts over epochs; a loss scale that is found anew loses an update now and then, which is none."""

    def __init__(self) -> None:
        """Begin with nothing lost."""
        self._lost = 0

    def count(self, lost: int, updates: int) -> None:
        """Take in how many of an epoch's updates were left out. Raises DivergedError where too many were."""
        self._lost = self._lost + lost if 2 * lost >= updates else 0
        if lost and self._lost >= MOST_LOST:
            raise DivergedError(
                f"The training diverged: of the last gradients {self._lost} were not finite, half or more of each "
                "epoch; choose a smaller lr0, or amp=off."
            )
