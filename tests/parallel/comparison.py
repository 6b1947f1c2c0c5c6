"""Comparison of runs: what has to be equal between a layout and one process, and how nearly."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from training_runs import Run

DOUBLE_BOUND = 1e-6
"""Largest difference in double, relative to values above 1."""
ROUNDINGS = 3.0
"""In float32, how many times as far a layout may be from one process as that is from itself in double."""
STATES = ("losses", "network", "ema", "optimizer")


def single_of(run: Run) -> Run:
    """The same run in one process; ranks that normalise together see what one rank sees with the parts joined."""
    parts = 1 if run.bn == "sync" else run.parts
    return replace(run, engine="single", bn="local", stages=1, parts=parts, schedule="1f1b", staged=False, drawn=False)


def assert_same_run(
    found: dict[int, dict[str, Any]],
    expected: dict[int, dict[str, Any]],
    run: Run,
    exact: dict[int, dict[str, Any]] | None = None,
) -> None:
    """Compare what `train` gave under a layout with what one process gave; of float32 `exact` is the run in double."""
    assert abs(expected[1]["norm"] / run.clip - 1) < 1e-3, "clipping is meant to be active"
    assert expected[1]["losses"]["losses"][0, 3] > 1, "the normaliser is meant to matter"
    assert (exact is not None) == (run.dtype is torch.float32)
    assert found.keys() == expected.keys() == {1, run.updates}
    for number, states in expected.items():
        for state in STATES:
            assert found[number][state].keys() == states[state].keys()
            rounding = 0.0 if exact is None else largest(differences(states[state], exact[number][state]))
            for key, difference in differences(found[number][state], states[state]).items():
                assert difference <= max(ROUNDINGS * rounding, DOUBLE_BOUND), (number, state, key, difference, rounding)


def differences(values: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of each tensor, relative to values above 1."""
    found = {}
    for key, value in others.items():
        scale = value.double().abs().clamp(min=1)
        found[key] = float(((values[key].double() - value.double()).abs() / scale).max())
    return found


def largest(differences: dict[str, float]) -> float:
    """Return the largest of all."""
    return max(differences.values())
