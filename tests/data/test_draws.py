from __future__ import annotations

import numpy as np

from paceline.data.draws import hashed, permutation, uniforms


def test_draws_hang_on_their_address_alone() -> None:
    passes, samples = np.array([0, 0, 3]), np.array([5, 6, 5])
    together = uniforms(7, passes, samples, 17)
    for row in range(3):
        alone = uniforms(7, passes[row : row + 1], samples[row : row + 1], 17)
        np.testing.assert_array_equal(alone[0], together[row])
    np.testing.assert_array_equal(uniforms(7, passes, samples, 4), together[:, :4])
    assert len(np.unique(together)) == together.size
    assert (uniforms(8, passes, samples, 17) != together).all()


def test_draws_are_uniform_and_uncorrelated() -> None:
    numbers = uniforms(0, np.zeros(20_000, np.int64), np.arange(20_000), 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in numbers.T])
    assert np.abs(counts - 1000).max() < 5 * 1000**0.5
    assert np.abs(np.corrcoef(numbers.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.03


def test_permutations_are_permutations_and_differ() -> None:
    first, second = permutation(1, 0, 1000), permutation(1, 1, 1000)
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    assert (first == second).sum() < 20
    np.testing.assert_array_equal(first, permutation(1, 0, 1000))


def test_hash_is_the_published_one() -> None:
    # The first output of SplitMix64 from state 0, which is the finaliser of the golden-ratio increment.
    assert int(hashed(0)[0]) == 0xE220A8397B1DCDAF
