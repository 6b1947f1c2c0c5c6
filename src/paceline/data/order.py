r"""Order: which sample comes when, as one endless stream, and which of it each rank makes.

    pass 0           pass 1           pass 2
    [4 0 2 1 3]      [1 3 0 4 2]      [2 ...          each pass is a permutation of all samples, from (seed, pass)
     \____/ \____/    \____/ \____/   \____          batch k is stream[k * batch : (k + 1) * batch], always full
      k=0    k=1       k=2    k=3      k=4             an epoch ends with the batch that completes its pass

A batch may span passes, so nothing has to be padded or dropped, and the state of the order is k alone.

    position   0  1  2  3  4  5  6  7 ...  63 | 64 65 66 ...       stripe = position modulo 64, whatever the ranks
    rank of 4  0  1  2  3  0  1  2  3 ...   3 |  0  1  2 ...       rank   = place in the batch modulo the world

Where the number of ranks divides 64 and the batch, a rank so makes whole stripes, and the same share of every batch.
With other numbers the deal is the same, but samples of one stripe go to several ranks.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.draws import permutation

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_STRIPES = 64
"""Part of the recipe, never the number of ranks: samples of one stripe find their partners in this stripe."""
_KEPT_PASSES = 4
_KEPT_SAMPLES = 16_384


def rows_of_rank(batch: int, rank: int, world: int) -> NDArray[np.int64]:
    """Places in a batch of all ranks of the samples that `rank` makes, in the order of its own batch.

    They hang on no step, so shapes stay fixed; `whole[rows_of_rank(batch, r, world)] = part of rank r` over all r
    puts the whole batch together.
    """
    assert 0 <= rank < world
    return np.arange(rank, batch, world, dtype=np.int64)


def _dealt(draws: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Choose numbers BP below `count` by `draws` BP in [0, 1); in a row none twice before each was chosen once."""
    chosen = np.empty(draws.shape, np.int64)
    for column in range(draws.shape[1]):
        dealt = column % count
        picked = (draws[:, column] * (count - dealt)).astype(np.int64)  # among those that are left
        for taken in np.sort(chosen[:, column - dealt : column], axis=1).T:
            picked += picked >= taken
        chosen[:, column] = picked
    return chosen


class Order:
    """The stream of samples for (number of samples, batch, seed); any step is found without walking there."""

    def __init__(self, num_samples: int, batch: int, seed: int) -> None:
        assert num_samples >= 1
        assert batch >= 1
        self.num_samples = num_samples
        self.batch_size = batch
        self.seed = seed
        self._kept: dict[int, NDArray[np.int64]] = {}
        self._num_kept = max(_KEPT_PASSES, -(-_KEPT_SAMPLES // num_samples))
        self._lock = threading.Lock()

    def steps_until_pass(self, number: int) -> int:
        """Return the first step that begins in pass `number` or later; epoch e ends where pass e + 1 begins."""
        return -(-number * self.num_samples // self.batch_size)

    def positions(self, step: int) -> NDArray[np.int64]:
        """Places B in the stream of the samples of `step`."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return samples and passes at `positions` of the stream, in arrays of the same shape."""
        passes, places = np.divmod(positions, self.num_samples)
        first = int(passes.min())
        if first == passes.max():  # nearly always
            return self._permutation(first)[places], passes
        samples = np.empty_like(positions)
        for number in np.unique(passes):
            inside = passes == number
            samples[inside] = self._permutation(int(number))[places[inside]]
        return samples, passes

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return samples B and passes B of batch `step`."""
        return self.at(self.positions(step))

    def recent(self, positions: NDArray[np.int64], draws: NDArray[np.float64], window: int) -> NDArray[np.int64]:
        """Pick samples BP by `draws` BP in [0, 1) from the `window` samples before each of `positions` B in its stripe.

        None is picked twice for a position, if the window has enough: of 16, two of three would be the same for a fifth
        of all positions. At the very start of the stream the window is the stripe's first `window` samples.
        """
        places, stripes = np.divmod(positions, NUM_STRIPES)
        chosen = np.maximum(places - window, 0)[:, None] + _dealt(draws, window)
        return self.at(chosen * NUM_STRIPES + stripes[:, None])[0]

    def _permutation(self, number: int) -> NDArray[np.int64]:
        with self._lock:
            found = self._kept.get(number)
        if found is None:
            found = permutation(self.seed, number, self.num_samples)
            with self._lock:
                self._kept[number] = found
                while len(self._kept) > self._num_kept:
                    del self._kept[min(self._kept)]
        return found
