"""Loader: batches from an index, made ahead by threads: augmented for training, letterboxed for evaluation."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Literal, Self

import cv2
import numpy as np
import torch

from paceline.batch import Batch
from paceline.data import augment, targets
from paceline.data.buffers import Buffers
from paceline.data.cache import ImageCache, choose_capacity, decoded_bytes
from paceline.data.decode import decode_compact, reductions
from paceline.data.faults import Faults
from paceline.data.headers import BadImage
from paceline.data.order import Order
from paceline.data.prefetch import Prefetcher
from paceline.data.render import FILL, Workspace, letterbox, render
from paceline.letterbox import Letterbox

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig, DataConfig
    from paceline.data.index import Index
    from paceline.data.prefetch import Work

log = logging.getLogger("paceline")

PREFETCHED_BATCHES = 3
PARTNERS_OF_ALL_BYTES = 4_000_000_000
"""Part of the recipe: mosaic partners come from the whole set when it needs no more than this decoded."""
PARTNER_WINDOW = 512
"""Part of the recipe: from larger sets, partners come from this many samples that came just before."""
_MOST_THREADS = 8


def num_threads(workers: int) -> int:
    """Loader threads for the option `workers`: -1 takes one per core that the process may use, 8 at most."""
    if workers < 0:
        return min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS
        )
    return max(workers, 1)


class Counters:
    """Sums that threads add to."""

    def __init__(self) -> None:
        names = ("decode_s", "render_s", "waited_s", "decodes", "cache_hits", "broken")
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


class Images:
    """Decoded images of an index by number, through the cache; broken ones raise `BrokenImage`."""

    def __init__(self, index: Index, reductions: NDArray[np.int64], capacity: int, counters: Counters) -> None:
        self.index = index
        self.reductions = reductions
        self._cache = ImageCache(capacity)
        self._counters = counters

    def get(self, number: int) -> NDArray[np.uint8]:
        """Pixels of an image, HW3 or HW, reduced."""
        try:
            pixels, was_there = self._cache.get(number, lambda: self._decode(number))
        except BadImage as error:
            raise BrokenImage(number, str(error)) from error
        if was_there:
            self._counters.add(cache_hits=1)
        return pixels

    def _decode(self, number: int) -> NDArray[np.uint8]:
        start = time.perf_counter()
        reduction = int(self.reductions[number])
        pixels = decode_compact(self.index.path(number), int(self.index.orientation[number]), reduction)
        if pixels.shape[:2] != tuple((-(-self.index.sizes[number] // reduction)).tolist()):
            raise BadImage("has another size than when it was indexed")
        self._counters.add(decode_s=time.perf_counter() - start, decodes=1)
        return pixels


class BrokenImage(Exception):  # noqa: N818
    """An image that could be read when it was indexed, and cannot be read now."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason


class _Loader:
    """What both loaders share: images, threads, buffers, counters, and their end."""

    def __init__(
        self, index: Index, imgsz: int, batch: int, workers: int, reductions: NDArray[np.int64], capacity: int
    ) -> None:
        assert len(index) >= 1
        cv2.setNumThreads(0)  # one thread per picture; OpenCV's own would fight with ours
        self.index = index
        self.imgsz = imgsz
        self.batch_size = batch
        self.faults = Faults(index)
        self.counters = Counters()
        self.images = Images(index, reductions, capacity, self.counters)
        self.buffers = Buffers((batch, imgsz, imgsz, 3), num_kept=PREFETCHED_BATCHES + 2)
        self._prefetcher = Prefetcher(num_threads(workers), PREFETCHED_BATCHES)
        self._local = threading.local()

    @property
    def workspace(self) -> Workspace:
        """Buffers of the calling thread."""
        found: Workspace | None = self._local.__dict__.get("workspace")
        if found is None:
            found = self._local.workspace = Workspace(self.imgsz)
        return found

    def stats(self) -> dict[str, float]:
        """Return sums since the start, by name.

        Seconds that threads spent decoding and rendering (all threads together), and the consumer waiting; numbers of
        images decoded, of images found in the cache, and of those that turned out to be broken.
        """
        return self.counters.read()

    def stream(self, works: Iterable[Work[Batch]]) -> Generator[Batch, None, None]:
        """Deliver batches, and count the seconds of waiting for them."""
        batches = self._prefetcher.stream(works)
        with closing(batches):
            while True:
                start = time.perf_counter()
                batch = next(batches, None)
                self.counters.add(waited_s=time.perf_counter() - start)
                if batch is None:
                    return
                yield batch

    def take_out(self, broken: BrokenImage) -> None:
        """Count and name a broken image. Raises UserError when there are too many."""
        self.counters.add(broken=float(self.faults.add(broken.number, broken.reason)))

    def close(self) -> None:
        """Stop the threads and wait for their end; a closed loader delivers nothing more."""
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TrainLoader(_Loader):
    """Augmented batches of the endless stream of samples; a pure function of (index, configs, seed, step).

    `window` overrides the recipe's rule for mosaic partners: 0 takes them from the whole set, else from that many
    samples that came just before.
    """

    def __init__(
        self, index: Index, config: DataConfig, augment: AugmentConfig, seed: int, *, window: int | None = None
    ) -> None:
        reduced = reductions(index.sizes, config.imgsz)
        needed_bytes = decoded_bytes(index.sizes, reduced)
        if window is None:
            window = 0 if needed_bytes <= PARTNERS_OF_ALL_BYTES else PARTNER_WINDOW
        at_a_time = window + (PREFETCHED_BATCHES + 1) * config.batch if window else 0
        capacity = choose_capacity(
            config.cache, len(index), needed_bytes, otherwise=min(at_a_time, len(index)), what="training"
        )
        super().__init__(index, config.imgsz, config.batch, config.workers, reduced, capacity)
        self.order = Order(len(index), config.batch, seed)
        self.config = augment
        self.seed = seed
        self.window = window

    def steps(self, epoch: int) -> int:
        """Count the batches of an epoch; it has none when a batch holds several passes and an earlier epoch took it."""
        return self.order.steps_until_pass(epoch + 1) - self.order.steps_until_pass(epoch)

    def epoch(self, epoch: int, *, mosaic: bool, start_step: int | None = None) -> Iterator[Batch]:
        """Batches of an epoch, in order, from `start_step` (a number of the whole run) where it is given.

        Raises UserError when more than 1 % of the images have become unreadable.
        """
        first = self.order.steps_until_pass(epoch) if start_step is None else start_step
        last = self.order.steps_until_pass(epoch + 1)
        return self.stream(_TrainWork(self, step, mosaic=mosaic) for step in range(first, last))

    def partners(self, positions: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
        """Mosaic partners B3 of the samples at `positions` B of the stream."""
        if self.window == 0:
            return augment.partners_of_all(draws, len(self.index))
        chosen = draws[:, augment.Slot.PARTNER_1 : augment.Slot.PARTNER_3 + 1]
        return self.order.recent(positions, chosen, min(self.window, len(self.index)))

    def plan(self, draws: NDArray[np.float64], images: NDArray[np.int64], *, mosaic: bool) -> augment.Transforms:
        """Make the transforms of pictures from their random numbers BS and images B4."""
        return augment.plan(
            self.config,
            self.imgsz,
            draws,
            images,
            self.index.sizes[images],
            self.images.reductions[images],
            mosaic=mosaic,
        )


class _TrainWork:
    """One training batch on its way."""

    def __init__(self, loader: TrainLoader, step: int, *, mosaic: bool) -> None:
        self._loader = loader
        self._step = step
        self._mosaic = mosaic

    def begin(self) -> int:
        """Draw the transforms."""
        loader = self._loader
        samples, passes = loader.order.batch(self._step)
        self._draws = augment.draw(loader.seed, passes, samples)
        partners = loader.partners(loader.order.positions(self._step), self._draws)
        self._images = np.concatenate([samples[:, None], partners], axis=1)
        self._transforms = loader.plan(self._draws, loader.faults.replace(self._images), mosaic=self._mosaic)
        self._buffer = loader.buffers.take()
        return len(samples)

    def make(self, part: int) -> None:
        """Render one picture, with others in the place of images that turn out to be broken."""
        loader = self._loader
        while True:
            sources = self._transforms.sources[part].tolist()
            try:
                images = [loader.images.get(source) if source >= 0 else None for source in sources]
                break
            except BrokenImage as broken:
                loader.take_out(broken)
                row = slice(part, part + 1)
                whole = loader.faults.replace(self._images[row])
                self._transforms.put(part, loader.plan(self._draws[row], whole, mosaic=self._mosaic))
        start = time.perf_counter()
        render(self._transforms, part, images, loader.workspace, self._buffer[part])
        loader.counters.add(render_s=time.perf_counter() - start)

    def finish(self) -> Batch:
        """Place the boxes."""
        pictures, boxes, labels = targets.transformed(self._loader.index, self._transforms)
        samples = self._transforms.samples
        return _batch(
            self._buffer, pictures, boxes, labels, samples, self._loader.index.sizes[samples].astype(np.int64)
        )


class EvalLoader(_Loader):
    """All images of an index in its order, letterboxed to `imgsz` x `imgsz`, in full batches.

    What is missing in the last batch, and images that have become unreadable, are grey and have sample -1.
    """

    def __init__(
        self,
        index: Index,
        imgsz: int,
        batch: int,
        workers: int = -1,
        cache: Literal["auto", "none", "ram"] = "none",
    ) -> None:
        reduced = reductions(index.sizes, imgsz, dividing=True)
        needed_bytes = decoded_bytes(index.sizes, reduced)
        capacity = 0
        if cache != "none":
            capacity = choose_capacity(cache, len(index), needed_bytes, otherwise=0, what="evaluation")
        super().__init__(index, imgsz, batch, workers, reduced, capacity)

    def __len__(self) -> int:
        """Count the batches."""
        return -(-len(self.index) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return self.stream(_EvalWork(self, step) for step in range(len(self)))

    def geometry(self, number: int) -> Letterbox:
        """How image `number` lies in its picture."""
        height, width = self.index.sizes[number].tolist()
        return Letterbox.fit(height, width, self.imgsz, self.imgsz)


class _EvalWork:
    """One batch for evaluation on its way."""

    def __init__(self, loader: EvalLoader, step: int) -> None:
        self._loader = loader
        numbers = np.arange(step * loader.batch_size, (step + 1) * loader.batch_size)
        self._samples = np.where(numbers < len(loader.index), numbers, -1)

    def begin(self) -> int:
        """Take a buffer."""
        self._buffer = self._loader.buffers.take()
        return len(self._samples)

    def make(self, part: int) -> None:
        """Letterbox one image."""
        loader, number = self._loader, int(self._samples[part])
        try:
            pixels = loader.images.get(number) if number >= 0 else None
        except BrokenImage as broken:
            loader.take_out(broken)
            pixels = None
        if pixels is None:
            self._samples[part] = -1
            self._buffer[part].fill(FILL)
            return
        start = time.perf_counter()
        letterbox(pixels, loader.geometry(number), self._buffer[part])
        loader.counters.add(render_s=time.perf_counter() - start)

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
        return _batch(self._buffer, seen[owners], boxes, index.labels[rows], self._samples, sizes)


def _batch(
    buffer_BHW3: NDArray[np.uint8],
    pictures: NDArray[np.int64],
    boxes: NDArray[np.float64],
    labels: NDArray[np.int32],
    samples: NDArray[np.int64],
    original_hw: NDArray[np.int64],
) -> Batch:
    boxes_BG4, labels_BG, valid_BG = targets.padded(pictures, boxes, labels, len(samples))
    return Batch(
        images=torch.from_numpy(buffer_BHW3).permute(0, 3, 1, 2),
        boxes=torch.from_numpy(boxes_BG4),
        labels=torch.from_numpy(labels_BG),
        valid=torch.from_numpy(valid_BG),
        samples=torch.from_numpy(samples),
        original_hw=torch.from_numpy(original_hw),
    )
