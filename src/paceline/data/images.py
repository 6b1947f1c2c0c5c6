"""Images: decoded pixels by number, the only door to them: cache first, then the store and the decoder."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from paceline.data.decode import decode_compact
from paceline.data.headers import BadImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from paceline.data.cache import ImageCache
    from paceline.data.index import Index
    from paceline.data.store import Store

log = logging.getLogger("paceline")

_SLOW_READ_S = 5.0


class Counters:
    """Sums that threads add to."""

    def __init__(self) -> None:
        names = ("decode_s", "render_s", "waited_s", "decodes", "cache_hits", "broken", "slow_reads")
        self._sums = dict.fromkeys(names, 0.0)
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        """Add to sums by name."""
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def read(self) -> dict[str, float]:
        """Return all sums since the start."""
        with self._lock:
            return dict(self._sums)


class BrokenImage(Exception):  # noqa: N818
    """An image that could be read when it was indexed, and cannot be read now."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason


class Images:
    """Decoded images of an index by number, through the cache; broken ones raise `BrokenImage`."""

    def __init__(
        self, index: Index, store: Store, reductions: NDArray[np.int64], cache: ImageCache, counters: Counters
    ) -> None:
        self.index = index
        self.store = store
        self.reductions = reductions
        self._cache = cache
        self._counters = counters

    def get(self, number: int, *, renew: bool = False) -> NDArray[np.uint8]:
        """Pixels of an image, HW3 or HW, reduced; `renew` where its turn in the order has come."""
        try:
            pixels, was_there = self._cache.get(number, lambda: self._decode(number), renew=renew)
        except BadImage as error:
            raise BrokenImage(number, str(error)) from error
        if was_there:
            self._counters.add(cache_hits=1)
        return pixels

    def _decode(self, number: int) -> NDArray[np.uint8]:
        """Read and decode; whatever goes wrong on the way is the fault of this image."""
        start = time.perf_counter()
        reduction = int(self.reductions[number])
        try:
            encoded = self.store.read(number)
            read_s = time.perf_counter() - start
            pixels = decode_compact(encoded, int(self.index.orientation[number]), reduction)
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(f"cannot be decoded ({type(error).__name__}: {error})") from error
        if pixels.shape[:2] != tuple((-(-self.index.sizes[number] // reduction)).tolist()):
            raise BadImage("has another size than when it was indexed")
        self._counters.add(decode_s=time.perf_counter() - start, decodes=1)
        if read_s > _SLOW_READ_S:
            self._name_slow(number, read_s)
        return pixels

    def _name_slow(self, number: int, read_s: float) -> None:
        """Say once that a file took long; its picture has waited for it, for samples never hang on the disk's speed."""
        if self._counters.read()["slow_reads"] == 0:
            log.warning(
                "%s took %.0f s to read: training waits for the disk; the epoch's records count such reads.",
                self.index.path(number),
                read_s,
            )
        self._counters.add(slow_reads=1)
