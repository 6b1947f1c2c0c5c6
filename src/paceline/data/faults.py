"""Faults: images that are in the index and cannot be read now, or that no decoder here can read."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.headers import UNDECODABLE
from paceline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.index import Index

log = logging.getLogger("paceline")

REPLACED = "the next image takes its place"
"""What follows from a broken image in training."""
COUNTED_AS_MISSED = "nothing is found in it, so its objects count as missed"
"""What follows from a broken image in an evaluation."""
_TOLERATED_SHARE = 0.01
_NUM_LISTED = 20


class Faults:
    """The broken images of an index: each is named once in the log, and more than 1 % of them end the run.

    One broken image is always tolerated, however small the set. Each rank counts those that it meets; what takes their
    place hangs on the image alone, so ranks agree on it without a word, and none has more or fewer batches for it.
    """

    def __init__(self, index: Index, consequence: str = REPLACED) -> None:
        """Take what the log says to follow from each broken image."""
        self._index = index
        self._consequence = consequence
        self._reasons: dict[int, str] = {}
        nothing = np.zeros(0, np.int64)
        self._table = nothing, nothing  # the broken images in ascending order, and what takes the place of each
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, number: int, reason: str) -> bool:
        """Take image `number` out, and return whether it was in.

        Raises UserError with the list when there are too many.
        """
        with self._lock:
            if number in self._reasons:
                return False
            self._reasons[number] = reason
            broken, _ = self._table
            broken = np.insert(broken, np.searchsorted(broken, number), number)
            self._table = broken, _next_whole(broken, len(self._index))
            num_broken = len(self._reasons)
        log.warning("%s %s: %s", self._index.path(number), reason, self._consequence)
        if num_broken > max(1, _TOLERATED_SHARE * len(self._index)):
            raise UserError(self._list())
        return True

    def replace(self, images: NDArray[np.int64]) -> NDArray[np.int64]:
        """Put the next whole image of the index in the place of each broken one, in an array of any shape."""
        broken, next_whole = self._table  # as one, since another thread may add meanwhile
        if not len(broken):
            return images
        if len(broken) == len(self._index):
            raise UserError(self._list())
        places = np.minimum(np.searchsorted(broken, images), len(broken) - 1)
        return np.where(broken[places] == images, next_whole[places], images)

    def _list(self) -> str:
        with self._lock:
            reasons = dict(self._reasons)
        listed = [f"\n  {self._index.path(number)} {why}" for number, why in reasons.items()]
        more = len(listed) - _NUM_LISTED
        shown = "".join(listed[:_NUM_LISTED]) + (f"\n  and {more} more" if more > 0 else "")
        undecodable = sum(why.startswith(UNDECODABLE) for why in reasons.values())
        if undecodable == len(listed):
            what, mend = UNDECODABLE, "convert them to 8-bit JPEG or PNG"
        elif undecodable:
            what, mend = "cannot be read any more or cannot be decoded", "restore or convert them"
        else:
            what, mend = "cannot be read any more", "restore them"
        return (
            f"{len(listed)} of {len(self._index)} images {what}; {mend}, or take them out of the data set and start "
            f"again:{shown}"
        )


def _next_whole(broken: NDArray[np.int64], num_images: int) -> NDArray[np.int64]:
    """Return the image after the run that each broken one is in, the first image following the last."""
    following = np.append(broken[1:], num_images + 1)
    ends = np.where(following == broken + 1, num_images, broken + 1)  # a run ends where the next one is not broken
    after = np.minimum.accumulate(ends[::-1])[::-1]
    first = after[0] if broken[0] == 0 else 0
    return np.where(after == num_images, first, after)
