"""Window: on the device, the decoded images that streamed batches are drawn from, each decoded once for all of them.

    threads     read the files of batch k + 1, place its boxes, pack its table      (`streamed.py`)
    consumer    bring: decode what batch k has and the window has not, say where in the window each image lies
    consumer    copy the table of k, draw k from the window                         (`feeder.py`)

All work on the window's memory is started in one lane, in the order of the batches: what is written over was drawn
before. So nobody counts who still draws, and nobody waits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.data.augment import num_tiles
from paceline.data.device.arena import ALIGNMENT, Arena
from paceline.data.device.decode import BatchDecoder, batches
from paceline.data.device.files import Files
from paceline.data.images import BrokenImage
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.data.device.codec import Codec
    from paceline.data.device.files import Source
    from paceline.data.device.lanes import Lane
    from paceline.data.device.pack import PackedBatch
    from paceline.data.device.streamed import StreamedBatch
    from paceline.data.loader import TrainLoader

_DEVIATIONS, _FOR_GAPS = 3.0, 1.1
"""Room for as many images as are kept, by how much their sizes vary, and a tenth more for the gaps between them."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where an image lies in the window."""

    start: int
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape)


class DeviceWindow:
    """Images of `loader` on `device`, decoded there by `codec`; the one that came first goes first.

    As many are kept as the host would keep, and all of one batch in any case, in memory that is made here. Only the
    consumer's thread calls it. Raises UserError where there is no room.
    """

    def __init__(self, loader: TrainLoader, codec: Codec, device: torch.device, lane: Lane) -> None:
        self.files = Files(loader)
        self._loader = loader
        self._device = device
        self._lane = lane
        self._decoder = BatchDecoder(loader, codec, device, loader.pool, self.files.refused)
        num_bytes = window_bytes(loader)
        try:
            with lane.working():  # memory of this lane: freed, it goes to nobody before the lane's work is done
                self.pixels = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"decode=device needs {num_bytes / 1e9:.1f} GB on {device} for images that are needed again soon, and "
                "not as much is left there; choose decode=host."
            ) from error
        self._arena = Arena(num_bytes)
        self._places: dict[int, _Place] = {}
        self._starts = np.zeros(len(loader.index) + 1, np.int64)
        """First byte of each image that is there, by number; the last one is for tiles without an image."""

    @property
    def num_images(self) -> int:
        """Count the images that are there."""
        return len(self._places)

    def bring(self, batch: StreamedBatch) -> PackedBatch:
        """Start to decode what a batch needs and is not there, and say in its table where each of its images lies.

        An image that turns out to be broken is a fault of the loader, and another takes its place in the batch. Raises
        UserError when there are too many.
        """
        with self._lane.working():
            while broken := self._bring(batch):
                batch = batch.without(broken)
                assert not broken & batch.sources.keys(), "others have taken their place"
        batch.packed.move(self._starts[batch.numbers])
        return batch.packed

    def forget(self) -> None:
        """Let go of all images, here and on their way here."""
        for number in list(self._places):
            self._drop(number)
        self.files.forget()

    def _bring(self, batch: StreamedBatch) -> set[int]:
        """Bring what is missing; returns the images that turned out to be broken."""
        for number in batch.numbers[:, 0].tolist():  # whose turn has come
            if number in self._places:
                self._places[number] = self._places.pop(number)
        missing = {number: source for number, source in batch.sources.items() if number not in self._places}
        self._make_room(len(missing), batch.sources)
        broken: set[int] = set()
        for number, image in self._decoded(missing):
            if isinstance(image, BrokenImage):
                self.files.broken[number] = image
                broken.add(number)
            else:
                assert batch.sources[number].planes == (1 if image.ndim == 2 else image.shape[2])
                self._put(number, image, batch.sources)
        return broken

    def _decoded(self, missing: dict[int, Source]) -> Iterable[tuple[int, Tensor | BrokenImage]]:
        """Decode images, the files among them in as few calls as their sizes allow."""
        files = {number: source.content for number, source in missing.items() if isinstance(source.content, bytes)}
        numbers = np.fromiter(files, np.int64, len(files))
        for part in batches(numbers, self._loader.index.sizes[numbers]):
            yield from zip(part, self._decoder.decode(part, [files[number] for number in part]), strict=True)
        for number, source in missing.items():
            if not isinstance(source.content, bytes):
                yield number, torch.from_numpy(source.content).to(self._device)

    def _put(self, number: int, image: Tensor, held: Collection[int]) -> None:
        """Copy an image to where there is room; the images `held` stay."""
        num_bytes = image.numel()
        start = self._arena.take(num_bytes)
        while start is None:
            oldest = next((other for other in self._places if other not in held), None)
            if oldest is not None:
                self._drop(oldest)
            else:
                self._close_gaps()
            start = self._arena.take(num_bytes)
            assert start is not None or oldest is not None, "there is room for the largest batch"
        self._lay(number, image, start)

    def _lay(self, number: int, image: Tensor, start: int) -> None:
        place = self._places[number] = _Place(start=start, shape=tuple(image.shape))
        self._starts[number] = start
        self.pixels[start : start + place.num_bytes].view(place.shape).copy_(image)

    def _make_room(self, count: int, held: Collection[int]) -> None:
        """Drop the oldest images, so that no more than are to be kept, or held by the batch, are there."""
        excess = len(self._places) + count - self._loader.num_recent
        for number in [number for number in self._places if number not in held][: max(excess, 0)]:
            self._drop(number)

    def _drop(self, number: int) -> None:
        place = self._places.pop(number)
        self._arena.give(place.start, place.num_bytes)

    def _close_gaps(self) -> None:
        """Move all images together, where those of one batch leave gaps that are too small each."""
        kept = {
            number: self.pixels[place.start : place.start + place.num_bytes].view(place.shape).clone()
            for number, place in self._places.items()
        }
        for number in kept:
            self._drop(number)
        for number, image in kept.items():
            start = self._arena.take(image.numel())
            assert start is not None
            self._lay(number, image, start)


def window_bytes(loader: TrainLoader) -> int:
    """Bytes that the window of a loader takes on the device."""
    extents = -(-loader.index.sizes.astype(np.int64) // loader.images.reductions[:, None])
    num_bytes: NDArray[np.int64] = -(-3 * extents.prod(axis=1) // ALIGNMENT) * ALIGNMENT
    at_once = min(len(loader.rows) * num_tiles(loader.config), len(num_bytes))
    largest = int(np.partition(num_bytes, len(num_bytes) - at_once)[len(num_bytes) - at_once :].sum())
    count = loader.num_recent
    usual = _FOR_GAPS * (count * num_bytes.mean() + _DEVIATIONS * count**0.5 * num_bytes.std())
    return min(max(largest, int(usual)), int(num_bytes.sum()))
