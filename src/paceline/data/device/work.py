"""Work: one batch that is packed for the device instead of being drawn on the host."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data import paste
from paceline.data.device.pack import Sources, laid_out
from paceline.data.device.resident import in_memory, resident
from paceline.data.prefetch import Work
from paceline.data.work import PlannedBatch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.device.buffers import PackBuffers
    from paceline.data.device.pack import Copies, PackedBatch, Resident
    from paceline.data.device.resident import FlatImages, ImageTable
    from paceline.data.index import Index
    from paceline.data.loader import TrainLoader
    from paceline.data.work import Schedule

_LEAST_BYTES = 1 << 20
"""That a part copies: some hundred microseconds."""


class PackedWork(Work["PackedBatch"]):
    """One training batch on its way to the device.

    `images` are all decoded images as they lie in memory, where they do; pictures whose images are not all among them
    are fetched one by one. With `on_device`, all of them on the device, only numbers are packed. Pixels are copied in a
    round of its own, when all are there, since one thread alone takes longer for it than all for all the rest.
    """

    def __init__(
        self,
        loader: TrainLoader,
        schedule: Schedule,
        step: int,
        buffers: PackBuffers,
        *,
        images: FlatImages | None,
        on_device: ImageTable | None,
    ) -> None:
        self._loader = loader
        self._schedule = schedule
        self._step = step
        self._buffers = buffers
        self._flat = images
        self._on_device = on_device

    def begin(self) -> int:
        """Draw the transforms, and see whether the images have to be fetched."""
        self._planned = PlannedBatch(self._loader, self._schedule, self._step)
        count = len(self._planned)
        sources = self._planned.transforms.sources[self._planned.row(0) : self._planned.row(0) + count]
        table = self._flat if self._on_device is None else self._on_device
        self._is_flat = table is not None and bool((table.heights[sources[sources >= 0]] > 0).all())
        self._copies: list[Copies] | None = None
        if self._is_flat:
            return 0
        assert self._on_device is None, "what is broken was found when the images were uploaded"
        self._fetched: list[list[NDArray[np.uint8] | None]] = [[] for _ in range(count)]
        self._num_parts = self._loader.num_parts
        return self._num_parts

    def make(self, part: int) -> None:
        """Fetch the images of some of the pictures; in the second round, copy pixels."""
        if self._copies is not None:
            start = time.perf_counter()
            self._copies[part].make()
            self._loader.counters.add(render_s=time.perf_counter() - start)
            return
        num_images = 0
        for place in range(part, len(self._fetched), self._num_parts):
            self._fetched[place] = self._planned.fetch(place, self._loader.images.get)
            num_images += len(self._fetched[place])
        self._loader.counters.add(images=num_images)

    def go_on(self) -> int:
        """Pack table and targets, and see what is to be copied."""
        if self._copies is not None:
            return 0
        start = time.perf_counter()
        transforms = rows_of(self._planned.transforms, self._planned.row(0), len(self._planned))
        where: Sources | Resident
        if not self._is_flat:
            where = Sources.of(self._fetched)
        elif self._on_device is not None:
            where = resident(self._on_device, transforms.sources)
        else:
            assert self._flat is not None
            where = in_memory(self._flat, transforms.sources)
        masks = masks_of(self._loader.index, transforms)
        targets = self._planned.targets()
        self._batch, copies = laid_out(transforms, where, targets, self._buffers.take, masks)
        most = max(copies.num_bytes // _LEAST_BYTES, 1)
        self._copies = copies.parts(min(most, self._loader.num_threads))
        self._loader.counters.add(render_s=time.perf_counter() - start, images=transforms.sources.size * self._is_flat)
        return len(self._copies)

    def finish(self) -> PackedBatch:
        """Return the batch."""
        return self._batch


def masks_of(index: Index, transforms: Transforms) -> dict[tuple[int, int], NDArray[np.uint8]]:
    """Opacity of the masked tiles by (picture, tile), as `packed` takes it."""
    return {
        (int(row), tile): mask
        for row in (np.flatnonzero(transforms.masked.any(axis=1)) if transforms.masked.any() else ())
        for tile, mask in paste.masks(index, transforms, int(row)).items()
    }


def rows_of(transforms: Transforms, first: int, count: int) -> Transforms:
    """Return a part of the pictures, as views."""
    parts: dict[str, Any] = {
        name: value[first : first + count] for name, value in vars(transforms).items() if isinstance(value, np.ndarray)
    }
    return dataclasses.replace(transforms, **parts)
