from __future__ import annotations

import math

import pytest

from paceline.cli.wording import duration, figure, plural, rate


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-1, "0.0 s"), (3.24, "3.2 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"),
     (93600, "26:00:00")],
)  # fmt: skip
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("per_s", "words"), [(0.5, "0.50"), (9.999, "10.0"), (92.14, "92.1"), (99.96, "100"), (1234, "1,234")]
)
def test_rate(per_s: float, words: str) -> None:
    assert rate(per_s) == words


def test_undefined_figures_are_dashes() -> None:
    assert [figure(value) for value in (0, 0.12345, 1, -1, math.nan)] == ["0.000", "0.123", "1.000", "-", "-"]


def test_plural() -> None:
    assert [plural(1, "epoch"), plural(1200, "epoch"), plural(0, "class", "classes")] == [
        "1 epoch", "1,200 epochs", "0 classes",
    ]  # fmt: skip
