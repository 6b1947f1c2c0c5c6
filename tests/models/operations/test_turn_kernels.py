"""Turns: every piece of a map once, all programs at one place of it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

turns = pytest.importorskip("paceline.models.operations.turn_kernels")


@given(pieces=st.integers(1, 300), wanted=st.integers(1, 80))
def test_every_piece_has_one_turn(pieces: int, wanted: int) -> None:
    parts = min(pieces, wanted)
    counts = [turns._num_turns.fn(part, parts, pieces) for part in range(parts)]
    assert max(counts) - min(counts) <= 1, "no program has much more to do"
    order = [
        turns._piece.fn(turn, part, parts)
        for turn in range(max(counts))
        for part in range(parts)
        if turn < counts[part]
    ]
    assert sorted(order) == list(range(pieces))
    assert all(later - earlier == 1 for earlier, later in pairwise(order)), "programs walk through the map together"
