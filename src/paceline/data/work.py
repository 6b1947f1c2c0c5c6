"""Work: one batch on its way through the threads, for training and for evaluation."""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from paceline.batch import Batch
from paceline.data import augment, paste, targets
from paceline.data.images import BrokenImage
from paceline.data.plain import plain_of
from paceline.data.prefetch import Work
from paceline.data.render import FILL, letterbox, render
from paceline.data.sizes import size_of_step
from paceline.data.user_transform import seeds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.loader import EvalLoader, TrainLoader
    from paceline.data.plain import Plain

T = TypeVar("T")
Image_co = TypeVar("Image_co", covariant=True)

_PLANNED_PICTURES = 64
_DRAWN_PICTURES = 4
"""By one call: threads take turns in Python, and the images of all are in memory at once."""

Changed: TypeAlias = "dict[int, tuple[NDArray[np.float64], NDArray[np.int32]]]"
"""Boxes and labels of pictures that the user's function has changed, by their place in the batch."""
Targets: TypeAlias = dict[str, np.ndarray[Any, np.dtype[Any]]]
"""What a `Batch` holds but for the images, by name."""


class Get(Protocol[Image_co]):
    """Finds an image by number, as pixels or in another form; `Images.get`, say."""

    def __call__(self, number: int, /, *, renew: bool) -> Image_co:
        """Return it; `renew` where its turn in the order has come. Raises BrokenImage."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Planned:
    """The transforms of several batches, drawn together: numpy's calls cost the same for many pictures as for few.

    `first` is their first step; batch `step` has the rows from `(step - first) * number of pictures`.
    """

    first: int
    draws: NDArray[np.float64]
    images: NDArray[np.int64]
    """Sample and partners of each picture, broken ones too."""
    transforms: Transforms
    plain: Plain | None
    """Of the transforms, where the pictures are drawn here and not on a device."""
    pictures: NDArray[np.int64]
    """Row of each target, ascending."""
    boxes: NDArray[np.float64]
    labels: NDArray[np.int32]


class Schedule:
    """Plans the steps of an epoch, a few batches at a time, each once, whichever thread comes first."""

    def __init__(self, loader: TrainLoader, steps: range, *, mosaic: bool, on_device: bool = False) -> None:
        self._loader = loader
        self._steps = steps
        self._on_device = on_device
        self.mosaic = mosaic
        one_size = len(loader.sizes) == 1
        self._at_once = max(_PLANNED_PICTURES // len(loader.rows), 1) if one_size else 1
        self._planned: Planned | None = None
        self._lock = threading.Lock()

    def at(self, step: int) -> Planned:
        """Return the plan that holds `step`; steps are asked for in their order, but for a few that change places."""
        first = step - (step - self._steps.start) % self._at_once
        with self._lock:
            planned = self._planned
            if planned is None or planned.first < first:
                planned = self._planned = self._plan(first)
        return planned if planned.first == first else self._plan(first)

    def _plan(self, first: int) -> Planned:
        loader, order = self._loader, self._loader.order
        steps = range(first, min(first + self._at_once, self._steps.stop))
        positions = np.concatenate([order.positions(step)[loader.rows] for step in steps])
        samples, passes = order.at(positions)
        draws = augment.draw(loader.seed, passes, samples)
        images = np.concatenate([samples[:, None], loader.partners(positions, draws)], axis=1)
        size = size_of_step(loader.sizes, loader.seed, first)
        transforms = loader.plan(draws, loader.faults.replace(images), size=size, mosaic=self.mosaic)
        pictures, boxes, labels = targets.transformed(loader.index, transforms)
        return Planned(
            first=first,
            draws=draws,
            images=images,
            transforms=transforms,
            plain=None if self._on_device else plain_of(transforms),
            pictures=pictures,
            boxes=boxes,
            labels=labels,
        )


class PlannedBatch:
    """The part of a plan that makes one batch: its rows, their images, their targets."""

    def __init__(self, loader: TrainLoader, schedule: Schedule, step: int) -> None:
        self._loader = loader
        self._schedule = schedule
        self._replaced = False
        self._planned = schedule.at(step)
        self._count = len(loader.rows)
        self._start = (step - self._planned.first) * self._count

    def __len__(self) -> int:
        """Count the pictures."""
        return self._count

    @property
    def transforms(self) -> augment.Transforms:
        """Transforms of several batches; this one begins at `row(0)`."""
        return self._planned.transforms

    @property
    def plain(self) -> Plain | None:
        """What is plain of the transforms."""
        return self._planned.plain

    def row(self, place: int) -> int:
        """Row of the plan of a picture of the batch."""
        return self._start + place

    def fetch(self, place: int, get: Get[T]) -> list[T | None]:
        """Images of a picture's tiles by `get`, with others in the place of images that turn out to be broken."""
        loader, planned, row = self._loader, self._planned, self._start + place
        if loader.window and planned.transforms.sources[row, 0] < 0:
            # Its own picture does not show it, but others will. Made later it would stay beyond its time, and drive
            # others out before theirs. What is broken is noticed by who shows it.
            with suppress(BrokenImage):
                get(int(planned.transforms.samples[row]), renew=True)
        while True:
            sources = planned.transforms.sources[row].tolist()
            try:
                return [get(source, renew=tile == 0) if source >= 0 else None for tile, source in enumerate(sources)]
            except BrokenImage as broken:
                loader.take_out(broken)
                rows = slice(row, row + 1)
                whole = loader.faults.replace(planned.images[rows])
                size, mosaic = planned.transforms.size, self._schedule.mosaic
                other = loader.plan(planned.draws[rows], whole, size=size, mosaic=mosaic)
                planned.transforms.put(row, other)
                if planned.plain is not None:
                    planned.plain.put(row, plain_of(other))
                self._replaced = True

    def seed(self, place: int) -> int:
        """Return the seed of the user's function for a picture of the batch."""
        row = self._start + place
        return int(seeds(self._planned.draws[row : row + 1])[0])

    def targets(self, changed: Changed | None = None) -> Targets:
        """Place the boxes, after all images are there; `changed` are those that the user's function has left."""
        index, planned = self._loader.index, self._planned
        if self._replaced:  # what the other batches of the plan do at this moment does not reach our rows
            pictures, boxes, labels = targets.transformed(index, planned.transforms)
        else:
            pictures, boxes, labels = planned.pictures, planned.boxes, planned.labels
        first = bisect_left(pictures, self._start)  # numpy's would let other threads in, and wait for its turn
        last = bisect_left(pictures, self._start + self._count, first)
        pictures, boxes, labels = pictures[first:last] - self._start, boxes[first:last], labels[first:last]
        if changed is not None:
            pictures, boxes, labels = targets.joined([changed[place] for place in range(self._count)])
        samples = planned.transforms.samples[self._start : self._start + self._count].copy()
        return _targets(
            pictures,
            boxes,
            labels,
            samples,
            index.sizes[samples].astype(np.int64),
        )


class TrainWork(Work["Batch"]):
    """One training batch on its way."""

    def __init__(self, loader: TrainLoader, schedule: Schedule, step: int) -> None:
        self._loader = loader
        self._schedule = schedule
        self._step = step
        self._changed: Changed = {}

    def begin(self) -> int:
        """Draw the transforms."""
        self._planned = PlannedBatch(self._loader, self._schedule, self._step)
        size = self._planned.transforms.size
        self._buffer = self._loader.take_buffer(size, size)
        self._num_parts = self._loader.num_parts
        return self._num_parts

    def make(self, part: int) -> None:
        """Render some of the pictures, and let the user's function change them."""
        count, parts = len(self._buffer), self._num_parts
        first, after = count * part // parts, count * (part + 1) // parts
        for start in range(first, after, _DRAWN_PICTURES):
            self._draw(range(start, min(start + _DRAWN_PICTURES, after)))

    def _draw(self, places: range) -> None:
        """Draw pictures that lie side by side."""
        loader, planned, transforms = self._loader, self._planned, self._planned.transforms
        images = [planned.fetch(place, loader.images.get) for place in places]
        fetched = time.perf_counter()
        rows, out = range(planned.row(places.start), planned.row(places.stop)), self._buffer[places.start : places.stop]
        masks = partial(paste.masks, loader.index, transforms)
        render(transforms, rows, images, loader.workspace(transforms.size), out, plain=planned.plain, masks=masks)
        if loader.transform:
            for place, row, picture in zip(places, rows, out, strict=True):
                _, boxes, labels = targets.transformed(loader.index, transforms.row(row))
                self._changed[place] = loader.transform.change(picture, boxes, labels, planned.seed(place))
        loader.counters.add(render_s=time.perf_counter() - fetched, images=sum(map(len, images)))

    def finish(self) -> Batch:
        """Place the boxes."""
        return _batch(self._buffer, self._planned.targets(self._changed if self._loader.transform else None))


class EvalWork(Work["Batch"]):
    """One batch for evaluation on its way."""

    def __init__(self, loader: EvalLoader, step: int) -> None:
        self._loader = loader
        self._shape = loader.shapes[step].tolist()
        places, last = step * loader.batch_size + loader.rows, len(loader.order) - 1
        self._samples = np.where(places <= last, loader.order[np.minimum(places, last)], -1)

    def begin(self) -> int:
        """Take a buffer."""
        self._buffer = self._loader.take_buffer(*self._shape)
        self._num_parts = self._loader.num_parts
        return self._num_parts

    def make(self, part: int) -> None:
        """Letterbox some of the images."""
        for place in range(part, len(self._samples), self._num_parts):
            self._make(place)

    def _make(self, place: int) -> None:
        loader, number = self._loader, int(self._samples[place])
        try:
            pixels = loader.images.get(number) if number >= 0 else None
        except BrokenImage as broken:
            loader.take_out(broken)
            pixels = None
        if pixels is None:
            self._samples[place] = -1
            self._buffer[place].fill(FILL)
            return
        start = time.perf_counter()
        letterbox(pixels, loader.geometry(number), self._buffer[place])
        loader.counters.add(render_s=time.perf_counter() - start, images=1)

    def finish(self) -> Batch:
        """Place the boxes."""
        index, seen = self._loader.index, np.flatnonzero(self._samples >= 0)
        rows, owners = targets.boxes_of(index, self._samples[seen])
        boxes = index.boxes[rows].astype(np.float64)
        sizes = np.ones((len(self._samples), 2), np.int64)
        for place, picture in enumerate(seen):
            sizes[picture] = index.sizes[self._samples[picture]]
            mine = owners == place
            boxes[mine] = self._loader.geometry(int(self._samples[picture])).forward(boxes[mine])
        return _batch(self._buffer, _targets(seen[owners], boxes, index.labels[rows], self._samples, sizes))


def _targets(
    pictures: NDArray[np.int64],
    boxes: NDArray[np.float64],
    labels: NDArray[np.int32],
    samples: NDArray[np.int64],
    original_hw: NDArray[np.int64],
) -> Targets:
    boxes_BG4, labels_BG, valid_BG = targets.padded(pictures, boxes, labels, len(samples))
    return {
        "boxes": boxes_BG4,
        "labels": labels_BG,
        "valid": valid_BG,
        "samples": samples,
        "original_hw": original_hw,
    }


def _batch(buffer_BHW3: NDArray[np.uint8], targets: Targets) -> Batch:
    return Batch(
        images=torch.from_numpy(buffer_BHW3).permute(0, 3, 1, 2),
        **{name: torch.from_numpy(array) for name, array in targets.items()},
    )
