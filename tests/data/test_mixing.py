"""Shares, rectangles, and what they leave of boxes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.data.config import AugmentConfig
from paceline.data.draws import hashed, keys, numbers, uniforms
from paceline.data.mixing import beta_shares, cut_rectangles, mix, trim
from paceline.data.slots import Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

KEYS = hashed(np.arange(20000))


def test_shares_are_beta_distributed() -> None:
    """Against the distribution function of Beta(32, 32), as a sum of binomial terms, at its Kolmogorov distance."""
    shares = np.sort(beta_shares(KEYS))
    expected = [sum(math.comb(63, k) * x**k * (1 - x) ** (63 - k) for k in range(32, 64)) for x in shares[::50]]
    empirical = np.arange(len(shares))[::50] / len(shares)
    assert np.abs(empirical - expected).max() < 1.63 / math.sqrt(len(shares))  # 1 % of true samples are further off


def test_rectangles_lie_in_the_picture_and_have_its_proportions() -> None:
    cuts = cut_rectangles(320, KEYS)
    assert (cuts[:, :2] >= 0).all()
    assert (cuts[:, 2:] <= 320).all()
    inside = ((cuts[:, :2] > 0) & (cuts[:, 2:] < 320)).all(axis=1)
    sides = cuts[inside, 2:] - cuts[inside, :2]
    assert np.abs(sides[:, 0] - sides[:, 1]).max() <= 1
    assert 0.1 < (np.prod(cuts[:, 2:] - cuts[:, :2], axis=1) / 320**2).mean() < 0.5


def test_no_picture_is_both_mixed_and_cut() -> None:
    draws = uniforms(0, np.zeros(4000, np.int64), np.arange(4000), len(Slot))
    mixing = mix(AugmentConfig(mixup=0.3, cutmix=0.5), 320, draws)
    assert not (mixing.mixed & mixing.cut).any()
    assert abs(mixing.mixed.mean() - 0.3) < 0.03
    assert abs(mixing.cut.mean() - 0.7 * 0.5) < 0.03
    assert ((mixing.shares < 1) == mixing.mixed).all()
    assert (mixing.cuts.any(axis=1) == mixing.cut).all()


def test_numbers_of_keys_are_the_same_one_by_one() -> None:
    few = keys(np.array([0.25, 0.5, 1 - 2.0**-53]))
    together = numbers(few, 8)
    for row, key in enumerate(few):
        np.testing.assert_array_equal(numbers(np.array([key]), 5)[0], together[row, :5])
    assert len(np.unique(together)) == together.size


corner = st.integers(0, 12)


def rectangle(a: int, b: int, c: int, d: int) -> NDArray[np.int64]:
    return np.array([min(a, c), min(b, d), max(a, c) + 1, max(b, d) + 1])


@settings(max_examples=300, deadline=None)
@given(st.builds(rectangle, corner, corner, corner, corner), st.builds(rectangle, corner, corner, corner, corner))
def test_trimmed_box_is_what_can_be_seen(box: NDArray[np.int64], cut: NDArray[np.int64]) -> None:
    """Against painting: the bounds of the box' pixels that the rectangle does not hide."""
    seen = np.zeros((14, 14), bool)
    seen[box[1] : box[3], box[0] : box[2]] = True
    seen[cut[1] : cut[3], cut[0] : cut[2]] = False
    trimmed, area = trim(box[None].astype(float), cut[None])
    assert area[0] == seen.sum()
    if seen.any():
        ys, xs = np.nonzero(seen)
        assert trimmed[0].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    else:
        assert (trimmed[0, 2:] <= trimmed[0, :2]).any()


@pytest.mark.parametrize("off", [-0.4, -0.1, 0.0, 0.1, 0.4])
def test_less_than_half_a_pixel_beside_a_rectangle_is_nothing(off: float) -> None:
    """Pixels of a box from 3.9 to 10 begin at 4; a rectangle from there to its other side leaves none beside it."""
    box, cut = np.array([[4 + off, 2, 10 - off, 9]]), np.array([[4, 0, 10, 6]])
    turns = ([0, 1, 2, 3], [1, 0, 3, 2])
    for turn in turns:
        for flipped in (False, True):
            one, other = (12 - box[:, [2, 3, 0, 1]], 12 - cut[:, [2, 3, 0, 1]]) if flipped else (box, cut)
            trimmed, area = trim(one[:, turn], other[:, turn])
            expected = np.array([[4 + off, 6, 10 - off, 9]])
            expected = 12 - expected[:, [2, 3, 0, 1]] if flipped else expected
            np.testing.assert_allclose(trimmed, expected[:, turn])
            assert area[0] == pytest.approx((6 - 2 * off) * 7 - min(6, 6 - 2 * off) * 4)


@pytest.mark.parametrize("box", [[0.0, 0, 4, 4], [1.5, 2, 7, 3]])
def test_no_rectangle_hides_nothing(box: list[float]) -> None:
    trimmed, area = trim(np.array([box]), np.zeros((1, 4), np.int64))
    assert trimmed.tolist() == [box]
    assert area[0] == (box[2] - box[0]) * (box[3] - box[1])
