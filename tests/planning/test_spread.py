from __future__ import annotations

import random
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.planning.spread import Spread

SAMPLES = st.lists(st.floats(0.1, 1e6), min_size=1, max_size=60)


@given(SAMPLES)
def test_the_interval_lies_around_the_median_within_the_samples(samples: list[float]) -> None:
    spread = Spread.of(samples)
    assert min(samples) <= spread.low <= spread.median <= spread.high <= max(samples)
    assert spread.median == median(samples)
    assert spread.count == len(samples)


@pytest.mark.parametrize("count", [6, 9, 20, 51])
def test_the_interval_holds_the_median_as_often_as_it_says(count: int) -> None:
    draws = random.Random(count)
    held = 0
    for _ in range(2000):
        spread = Spread.of([draws.expovariate(1.0) for _ in range(count)])
        held += spread.low <= 0.6931 <= spread.high
    assert 0.94 < held / 2000 < 0.995


def test_more_samples_make_it_narrower() -> None:
    draws = random.Random(0)
    samples = [draws.gauss(10, 1) for _ in range(400)]
    few, many = Spread.of(samples[:20]), Spread.of(samples)
    assert many.high - many.low < (few.high - few.low) / 2


@given(SAMPLES)
def test_a_rate_is_the_spread_of_rates(samples: list[float]) -> None:
    of_rates, rate = Spread.of([16 / value for value in samples]), Spread.of(samples).rate(16)
    assert (rate.low, rate.high) == pytest.approx((of_rates.low, of_rates.high))
    if len(samples) % 2:
        assert rate.median == pytest.approx(of_rates.median)


@given(SAMPLES, SAMPLES)
def test_ratios_turn_round(samples: list[float], others: list[float]) -> None:
    one, other = Spread.of(samples), Spread.of(others)
    there, back = one.over(other), other.over(one)
    assert there.low <= there.median <= there.high
    assert (1 / back.high, 1 / back.median, 1 / back.low) == pytest.approx((there.low, there.median, there.high))


def test_units_scale_all_three() -> None:
    assert Spread.of([1.0, 2.0, 3.0]).times(1e3) == Spread(median=2e3, low=1e3, high=3e3, count=3)
