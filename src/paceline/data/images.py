"""Images: decoded pixels by number, the only door to them: cache first, then the store and the decoder."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.cache import SlabCache
from paceline.data.decode import decode_compact
from paceline.data.headers import UNDECODABLE, BadImage
from paceline.data.shelf import Shelf
from paceline.data.slab_file import WRITTEN
from paceline.data.store import FileStore
from paceline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.index import Index
    from paceline.data.store import Store
    from paceline.data.tiers import Choice, Purpose

log = logging.getLogger("paceline")

_SLOW_READ_S = 5.0


class Counters:
    """Sums that threads add to."""

    def __init__(self) -> None:
        names = ("decode_s", "render_s", "waited_s", "images", "decodes", "broken", "slow_reads")
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


@dataclass(frozen=True, kw_only=True, eq=False)
class DecodedSet:
    """All N decoded images of a loader, one after the other; image i is `flat[offsets[i]:]`, as many bytes as it has.

    Images that cannot be decoded have height 0; they are among the loader's faults, so no picture asks for them.
    """

    flat: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    """N, in bytes."""
    heights: NDArray[np.int32]
    """N, of the decoded image."""
    widths: NDArray[np.int32]
    """N, of the decoded image."""
    planes: NDArray[np.int32]
    """N, 3 or, without colour, 1."""


class Images:
    """Decoded images of an index by number, from where the shelf keeps them; broken ones raise `BrokenImage`.

    See `Shelf` for the arguments; `cache` is the user's choice. Close it at the end.
    """

    def __init__(
        self,
        index: Index,
        store: Store,
        reductions: NDArray[np.int64],
        counters: Counters,
        *,
        cache: Choice,
        num_recent: int,
        num_threads: int,
        world: int,
        what: Purpose,
    ) -> None:
        self.index = index
        self.reductions = reductions
        self._counters = counters
        self.shelf = Shelf(
            index,
            store,
            reductions,
            self._decode,
            num_recent=num_recent,
            num_threads=num_threads,
            world=world,
            what=what,
        )
        self.shelf.open(cache)
        self._cache = self.shelf.cache
        self._look = self._cache.look

    def get(self, number: int, *, renew: bool = False) -> NDArray[np.uint8]:
        """Pixels of an image, HW3 or HW, reduced; `renew` where its turn in the order has come."""
        found = self._look(number)
        if found is not None:
            return found
        try:
            return self._cache.get(number, partial(self._make, number), renew=renew)
        except BadImage as error:
            raise BrokenImage(number, str(error)) from error

    def encoded(self, number: int) -> bytes:
        """Bytes of an image as they are stored, for a decoder other than ours."""
        try:
            return self._read(number)
        except BadImage as error:
            raise BrokenImage(number, str(error)) from error

    def decoded(self, number: int, encoded: bytes) -> NDArray[np.uint8]:
        """Pixels of an image whose bytes are at hand, as `get` gives them, but kept nowhere."""
        try:
            return self._decode(number, encoded)
        except BadImage as error:
            raise BrokenImage(number, str(error)) from error

    def decoded_set(self) -> DecodedSet | None:
        """Return all images as they lie in memory; None where they are not kept there. The caller has got each once."""
        if not isinstance(self._cache, SlabCache) or self._cache.slab.full:
            return None
        table = self._cache.slab.table()
        there = table["state"] == WRITTEN
        return DecodedSet(
            flat=self._cache.slab.bytes,
            offsets=table["offset"].astype(np.int64),
            heights=np.where(there, table["height"], 0).astype(np.int32),
            widths=table["width"].astype(np.int32),
            planes=table["planes"].astype(np.int32),
        )

    @property
    def keeps_decoded(self) -> bool:
        """Whether decoded images are kept for good, in memory or on disk, so that few are decoded twice."""
        return self.shelf.tier in ("ram", "disk")

    def forget(self) -> None:
        """Let go of decoded images that are kept for a while only, where somebody else makes them from now on."""
        self._cache.forget()

    def close(self) -> None:
        """Let go of what is shared with other processes; pixels that somebody holds stay."""
        self.shelf.close()

    def _make(self, number: int) -> NDArray[np.uint8]:
        loaded = self._load(number)
        if isinstance(loaded, np.ndarray):
            return loaded
        return self._decode(number, self._read(number) if loaded is None else loaded)

    def _load(self, number: int) -> NDArray[np.uint8] | bytes | None:
        """Read and decode an ordinary file at once; its bytes, or None, where it has to be gone about in two steps."""
        store = self.shelf.store
        if type(store) is not FileStore or self.index.orientation[number] != 1:
            return None
        start, expected = time.perf_counter(), self._extents(number)
        loaded = store.load(number, expected[0] * expected[1], int(self.reductions[number]))
        took_s = time.perf_counter() - start
        if took_s > _SLOW_READ_S:
            self._name_slow(number, took_s)
        is_done = isinstance(loaded, np.ndarray) and loaded.shape[:2] == expected
        self._counters.add(decode_s=took_s, decodes=is_done)
        return loaded if is_done or isinstance(loaded, bytes) else None

    def _extents(self, number: int) -> tuple[int, int]:
        """Height and width of a decoded image."""
        reduction = int(self.reductions[number])
        height, width = self.index.sizes[number].tolist()
        return -(-height // reduction), -(-width // reduction)

    def _read(self, number: int) -> bytes:
        """Read; whatever goes wrong is the fault of this image."""
        start = time.perf_counter()
        try:
            encoded = self.shelf.store.read(number)
        except (BadImage, UserError):  # the latter is a store that is gone as a whole, no fault of an image
            raise
        except Exception as error:
            raise BadImage(f"cannot be read ({type(error).__name__}: {error})") from error
        read_s = time.perf_counter() - start
        if read_s > _SLOW_READ_S:
            self._name_slow(number, read_s)
        self._counters.add(decode_s=read_s)
        return encoded

    def _decode(self, number: int, encoded: bytes) -> NDArray[np.uint8]:
        """Decode; whatever goes wrong is the fault of this image."""
        start = time.perf_counter()
        try:
            pixels = decode_compact(encoded, int(self.index.orientation[number]), int(self.reductions[number]))
        except BadImage:
            raise
        except Exception as error:
            raise BadImage(f"{UNDECODABLE} ({type(error).__name__}: {error})") from error
        if pixels.shape[:2] != self._extents(number):
            raise BadImage("has another size than when it was indexed")
        self._counters.add(decode_s=time.perf_counter() - start, decodes=1)
        return pixels

    def _name_slow(self, number: int, read_s: float) -> None:
        """Say once that a file took long; its picture has waited for it, for samples never hang on the disk's speed."""
        if self._counters.read()["slow_reads"] == 0:
            log.warning(
                "%s took %.0f s to read: training waits for the disk; the epochs' records count such reads.",
                self.index.path(number),
                read_s,
            )
        self._counters.add(slow_reads=1)
