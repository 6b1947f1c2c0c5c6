"""Draws: random numbers that hang on what they are for, not on who draws them or when.

Every number is a hash of its address (seed, pass, sample, slot), so any thread, rank or restart computes it alone.
The hash is the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA
2014), chained over the parts of the address.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def hashed(*address: int | ArrayLike) -> NDArray[np.uint64]:
    """Hash broadcast integer arrays, elementwise, to uint64 of at least one dimension."""
    number, done = 0, 0
    for part in address:  # those at the front that are alike for all, without arrays
        if not isinstance(part, int):
            break
        number, done = _finalise_one(((number ^ (part & _MASK)) + int(_GOLDEN)) & _MASK), done + 1
    mixed = np.full(1, number, np.uint64)
    for part in address[done:]:
        key = np.uint64(part & _MASK) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        mixed = _finalise((mixed ^ key) + _GOLDEN)
    return mixed


def uniforms(seed: int, passes: NDArray[np.int64], samples: NDArray[np.int64], num_slots: int) -> NDArray[np.float64]:
    """Numbers BS in [0, 1), one per slot, for each of B (pass, sample); slot s is the same for any `num_slots`."""
    return _shares(hashed(seed, passes[:, None], samples[:, None], np.arange(num_slots)[None, :]))


def keys(draws: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Take random numbers in [0, 1) as keys that further ones hang from, one key each."""
    return (draws * 2.0**53).astype(np.uint64)


def numbers(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """Numbers BS in [0, 1) that hang from keys B; number s is the same for any `count`."""
    return _shares(hashed(keys[:, None], np.arange(count)[None, :]))


def permutation(seed: int, number: int, length: int) -> NDArray[np.int64]:
    """Shuffle the integers 0..length-1: the order of their hashes under (seed, number)."""
    return np.argsort(hashed(seed, number, np.arange(length)), kind="stable")


def _shares(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    shares: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64)
    shares *= 2.0**-53
    return shares


def _finalise(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Mix in place."""
    bits ^= bits >> np.uint64(30)
    bits *= np.uint64(0xBF58476D1CE4E5B9)
    bits ^= bits >> np.uint64(27)
    bits *= np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return bits


def _finalise_one(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK
    return bits ^ (bits >> 31)
