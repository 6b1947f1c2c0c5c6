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
    mixed = np.zeros(1, dtype=np.uint64)
    for part in address:
        key = np.uint64(part & _MASK) if isinstance(part, int) else np.asarray(part).astype(np.uint64)
        mixed = _finalise((mixed ^ key) + _GOLDEN)
    return mixed


def uniforms(seed: int, passes: NDArray[np.int64], samples: NDArray[np.int64], num_slots: int) -> NDArray[np.float64]:
    """Numbers BS in [0, 1), one per slot, for each of B (pass, sample); slot s is the same for any `num_slots`."""
    bits = hashed(seed, passes[:, None], samples[:, None], np.arange(num_slots)[None, :])
    numbers: NDArray[np.float64] = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def permutation(seed: int, number: int, length: int) -> NDArray[np.int64]:
    """Shuffle the integers 0..length-1: the order of their hashes under (seed, number)."""
    return np.argsort(hashed(seed, number, np.arange(length)), kind="stable")


def _finalise(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))
