"""Files: encoded images on their way to a device that decodes them, read once by threads for all batches of a window.

What no codec takes is decoded here, in the same threads, and goes to the device as pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.cache import RecentCache
from paceline.data.device.decode import planes_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.images import BrokenImage
    from paceline.data.loader import TrainLoader


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """An image as it comes to the device: the bytes of a JPEG file, or pixels."""

    content: bytes | NDArray[np.uint8]
    """A file, or pixels HW3 or HW, upright and reduced, in memory that may be written to."""
    planes: int
    """Of the decoded image: 3 or, without colour, 1."""


class Files:
    """Sources of the images of `loader` by number, kept as long as the host's shelf keeps decoded ones.

    Threads call it beside each other; the consumer alone adds to what is refused or broken.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self._images = loader.images
        self._recent: RecentCache[Source] = RecentCache(loader.num_recent)
        self.refused: set[int] = set()
        """Images that the codec would not take; when their turn comes again, the host decodes them at once."""
        self.broken: dict[int, BrokenImage] = {}
        """Images whose files could be read, and which turned out to be broken when they were decoded."""

    def get(self, number: int, /, *, renew: bool = False) -> Source:
        """Image `number`; `renew` where its turn in the order has come. Raises BrokenImage."""
        if number in self.broken:
            raise self.broken[number]
        return self._recent.get(number, partial(self._make, number), renew=renew)

    def forget(self) -> None:
        """Let go of all that was read."""
        self._recent.forget()

    def _make(self, number: int) -> Source:
        encoded = self._images.encoded(number)
        planes = 0 if number in self.refused else planes_of(encoded)
        if planes:
            return Source(content=encoded, planes=planes)
        pixels = np.require(self._images.decoded(number, encoded), requirements=["C", "W"])
        return Source(content=pixels, planes=1 if pixels.ndim == 2 else pixels.shape[2])
