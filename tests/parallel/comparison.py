"""Comparison of runs: what has to be equal between a layout and one process, and how nearly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from training_runs import Run

DOUBLE_BOUND, FLOAT_BOUND = 1e-6, 1e-4


def bound_of(run: Run) -> float:
    """Largest difference, relative to values above 1."""
    return FLOAT_BOUND if run.dtype is torch.float32 else DOUBLE_BOUND


def single_of(run: Run) -> Run:
    """The same run in one process; ranks that normalise together see what one rank sees with the parts joined."""
    parts = 1 if run.bn == "sync" else run.parts
    return replace(run, engine="single", bn="local", stages=1, parts=parts, schedule="1f1b", staged=False, drawn=False)


def assert_same_run(found: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]], run: Run) -> None:
    """Compare what `train` gave under a layout with what it gave in one process."""
    assert abs(expected[1]["norm"] / run.clip - 1) < 1e-3, "clipping is meant to be active"
    assert expected[1]["losses"]["losses"][0, 3] > 1, "the normaliser is meant to matter"
    bound = bound_of(run)
    assert found.keys() == expected.keys() == {1, run.updates}
    for number, states in expected.items():
        for state in ("losses", "network", "ema", "optimizer"):
            assert found[number][state].keys() == states[state].keys()
            for key, value in states[state].items():
                difference = (found[number][state][key].double() - value.double()).abs()
                scale = value.double().abs().clamp(min=1)
                assert (difference / scale).max() <= bound, (number, state, key)
