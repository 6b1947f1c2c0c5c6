"""Streamed: one batch whose images are decoded on the device; threads read the files, and pack everything else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.device.pack import Resident, packed
from paceline.data.device.work import masks_of, rows_of
from paceline.data.prefetch import Work
from paceline.data.work import PlannedBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    from numpy.typing import NDArray

    from paceline.data.device.buffers import PackBuffers
    from paceline.data.device.files import Files, Source
    from paceline.data.device.pack import PackedBatch
    from paceline.data.loader import TrainLoader
    from paceline.data.work import Schedule


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamedBatch:
    """A packed batch, and what its images are decoded from."""

    packed: PackedBatch
    """Its table counts from the beginning of each tile's own image."""
    numbers: NDArray[np.int64]
    """BT, image of each tile; -1 where there is none."""
    sources: Mapping[int, Source]
    """Each of these images once, by number, in the order of the batch."""
    without: Callable[[Collection[int]], StreamedBatch]
    """Makes the batch again, with others in the place of images that turned out to be broken."""


class StreamedWork(Work["StreamedBatch"]):
    """One training batch on its way to a device that decodes its images."""

    def __init__(self, loader: TrainLoader, schedule: Schedule, step: int, buffers: PackBuffers, files: Files) -> None:
        self._loader = loader
        self._schedule = schedule
        self._step = step
        self._buffers = buffers
        self._files = files

    def begin(self) -> int:
        """Draw the transforms."""
        self._planned = PlannedBatch(self._loader, self._schedule, self._step)
        self._sources: list[list[Source | None]] = [[] for _ in range(len(self._planned))]
        self._num_parts = self._loader.num_parts
        return self._num_parts

    def make(self, part: int) -> None:
        """Read the files of some of the pictures."""
        num_images = 0
        for place in range(part, len(self._sources), self._num_parts):
            self._sources[place] = self._planned.fetch(place, self._files.get)
            num_images += len(self._sources[place])
        self._loader.counters.add(images=num_images)

    def finish(self) -> StreamedBatch:
        """Pack table and targets."""
        start = time.perf_counter()
        index, images = self._loader.index, self._loader.images
        transforms = rows_of(self._planned.transforms, self._planned.row(0), len(self._planned))
        numbers = transforms.sources.copy()
        extents = -(-index.sizes[numbers].astype(np.int64) // images.reductions[numbers][..., None])
        where = Resident(
            offsets=np.zeros(numbers.shape, np.int64),
            heights=extents[..., 0],
            widths=extents[..., 1],
            planes=np.array([[source.planes if source else 1 for source in row] for row in self._sources]),
        )
        masks = masks_of(index, transforms)
        batch = packed(transforms, where, self._planned.targets(), self._buffers.take, masks)
        sources = {
            number: source
            for places, row in zip(numbers.tolist(), self._sources, strict=True)
            for number, source in zip(places, row, strict=True)
            if source is not None
        }
        self._loader.counters.add(render_s=time.perf_counter() - start)
        return StreamedBatch(packed=batch, numbers=numbers, sources=sources, without=self._without)

    def _without(self, broken: Collection[int]) -> StreamedBatch:
        """Make the pictures again that need one of the images `broken`, of which the files know that they are."""
        rows = self._planned.transforms.sources[self._planned.row(0) : self._planned.row(0) + len(self._planned)]
        for place in np.flatnonzero(np.isin(rows, list(broken)).any(axis=1)).tolist():
            self._sources[place] = self._planned.fetch(place, self._files.get)
        return self.finish()
