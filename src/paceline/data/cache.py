"""Cache: decoded images in memory, shared by all threads, each decoded once."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

log = logging.getLogger("paceline")

_SHARE_OF_FREE = 0.5
_CGROUP = Path("/sys/fs/cgroup")


class ImageCache:
    """At most `capacity` decoded images by number; the one that came first goes first, whoever looked at it since.

    A thread that asks for an image that another one is decoding waits for it, whatever the capacity.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._images: dict[int, Future[NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._images)

    def get(
        self, number: int, decode: Callable[[], NDArray[np.uint8]], *, renew: bool = False
    ) -> tuple[NDArray[np.uint8], bool]:
        """Return image `number`, and whether it was there; else `decode` makes it, and may raise to all who wait.

        With `renew` it counts as if it came now: its turn in the next pass has come before it had to go.
        """
        with self._lock:
            found = self._images.get(number)
            if renew and found is not None:
                self._images[number] = self._images.pop(number)
            if found is None:
                mine = self._images[number] = Future()
        if found is not None:
            return found.result(), True
        try:
            mine.set_result(decode())
        except BaseException as error:
            with self._lock:
                del self._images[number]
            mine.set_exception(error)
            raise
        with self._lock:
            self._evict()
        return mine.result(), False

    def _evict(self) -> None:
        excess = len(self._images) - self.capacity
        if excess > 0:
            done = (number for number, image in self._images.items() if image.done())
            for number in list(islice(done, excess)):
                del self._images[number]


def decoded_bytes(sizes: NDArray[np.integer[Any]], reductions: NDArray[np.int64]) -> int:
    """Bytes of N decoded images of `sizes` N2 px, reduced by `reductions` N, were all of them in colour."""
    return int(3 * np.prod(-(-sizes.astype(np.int64) // reductions[:, None]), axis=1).sum())


def free_memory_bytes() -> int:
    """Memory that this process may still take: of the machine, and of its container."""
    free = int(psutil.virtual_memory().available)
    try:  # version 2 of the control groups; without one, or without a limit, the machine's figure stands
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = (_CGROUP / "memory.current").read_text().strip()
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass
    return max(free, 0)


def choose_capacity(
    choice: Literal["auto", "none", "ram"], num_images: int, needed_bytes: int, *, otherwise: int, what: str
) -> int:
    """Images to keep: all of them, or `otherwise`; says in the log what was chosen for `what`, and why."""
    free = free_memory_bytes()
    keep_all = choice == "ram" or (choice == "auto" and needed_bytes <= _SHARE_OF_FREE * free)
    log.info(
        "cache=%s: %s images for %s need %.2f GB decoded, %.1f GB of memory are free: %s",
        choice,
        f"{num_images:,}",
        what,
        needed_bytes / 1e9,
        free / 1e9,
        "each is decoded once and kept" if keep_all else f"at most {otherwise:,} are kept at a time",
    )
    return num_images if keep_all else otherwise
