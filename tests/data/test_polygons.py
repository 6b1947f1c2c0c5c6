"""A ragged table of outlines behaves like the list of lists that it packs."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from paceline.data.polygons import Polygons

Outlines = list[list[NDArray[np.float32]]]


@st.composite
def outlines(draw: st.DrawFn) -> Outlines:
    counts = draw(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=6))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    return [[random.uniform(-5, 99, (count, 2)).astype(np.float32) for count in rings] for rings in counts]


def same(table: Polygons, expected: Outlines) -> None:
    assert table.num_rings(len(expected)).tolist() == [len(rings) for rings in expected]
    for box, rings in enumerate(expected):
        found = table.outline(box)
        assert len(found) == len(rings)
        for mine, ring in zip(found, rings, strict=True):
            np.testing.assert_array_equal(mine, ring)
    rows = np.arange(len(expected))
    assert table.outlined(rows).tolist() == [bool(rings) for rings in expected]


@given(outlines())
def test_packed_outlines_come_back(expected: Outlines) -> None:
    table = Polygons.of(expected)
    same(table, expected)
    assert bool(table) == any(expected)


@settings(max_examples=60)
@given(outlines(), st.data())
def test_selection_is_that_of_the_list(expected: Outlines, data: st.DataObject) -> None:
    table = Polygons.of(expected)
    rows = data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=8)) if expected else []
    same(table.select(np.array(rows, np.int64)), [expected[row] for row in rows])
    keep = np.array(data.draw(st.lists(st.booleans(), min_size=len(expected), max_size=len(expected))), np.bool_)
    same(table.select(keep), [rings for rings, kept in zip(expected, keep, strict=True) if kept])


@settings(max_examples=60)
@given(st.lists(outlines(), max_size=4))
def test_joined_tables_are_the_joined_lists(parts: list[Outlines]) -> None:
    table = Polygons.join([Polygons.of(part) for part in parts], [len(part) for part in parts])
    same(table, [rings for part in parts for rings in part])
