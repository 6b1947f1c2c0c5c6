"""Parts of a stretch of memory: none belongs to two, and what comes back is whole again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline.data.device.arena import ALIGNMENT, Arena, rounded

SIZES = st.integers(0, 700)


@given(st.integers(0, 60), st.lists(st.tuples(st.booleans(), SIZES), max_size=80))
def test_no_byte_belongs_to_two_and_all_come_back(blocks: int, steps: list[tuple[bool, int]]) -> None:
    """Against an owner for each byte."""
    arena, owners = Arena(blocks * ALIGNMENT), [-1] * (blocks * ALIGNMENT)
    taken: dict[int, tuple[int, int]] = {}
    for step, (takes, number) in enumerate(steps):
        if takes:
            start = arena.take(number)
            free = [owner == -1 for owner in owners]
            needed = rounded(number)
            if start is None:
                assert not any(
                    all(free[first : first + needed]) for first in range(0, len(owners) - needed + 1, ALIGNMENT)
                )
                continue
            assert start % ALIGNMENT == 0
            assert all(free[start : start + needed])
            assert start + needed <= len(owners)
            owners[start : start + needed] = [step] * needed
            taken[step] = (start, number)
        elif taken:
            key = list(taken)[number % len(taken)]
            start, size = taken.pop(key)
            owners = [-1 if owner == key else owner for owner in owners]
            arena.give(start, size)
        assert arena.free_bytes == owners.count(-1)
    for start, size in taken.values():
        arena.give(start, size)
    if blocks:
        assert arena.take(blocks * ALIGNMENT) == 0, "all of it is one part again"
    assert arena.take(1) is None


def test_the_lowest_part_that_is_large_enough_is_taken() -> None:
    arena = Arena(10 * ALIGNMENT)
    first, second, third = (arena.take(size * ALIGNMENT) for size in (2, 1, 3))
    assert (first, second, third) == (0, 2 * ALIGNMENT, 3 * ALIGNMENT)
    arena.give(0, 2 * ALIGNMENT)
    assert arena.take(3 * ALIGNMENT) == 6 * ALIGNMENT
    assert arena.take(ALIGNMENT + 1) == 0
    assert arena.take(1) == 9 * ALIGNMENT
