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
from paceline.data.decode import reductions
from paceline.data.faults import Faults
from paceline.data.images import BrokenImage, Counters, Images
from paceline.data.order import NUM_STRIPES, Order, rows_of_rank
from paceline.data.prefetch import Prefetcher
from paceline.data.render import FILL, Workspace, letterbox, render
from paceline.data.store import FileStore
from paceline.errors import UserError
from paceline.letterbox import Letterbox

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig, DataConfig
    from paceline.data.index import Index
    from paceline.data.prefetch import Work
    from paceline.data.store import Store

log = logging.getLogger("paceline")

PREFETCHED_BATCHES = 3
PARTNERS_OF_ALL_BYTES = 4_000_000_000
"""Part of the recipe: mosaic partners come from the whole set when it needs no more than this decoded."""
PARTNER_WINDOW = 16
"""Part of the recipe: from larger sets, partners come from this many samples that came before in the same stripe."""
_MOST_THREADS = 8


def num_threads(workers: int) -> int:
    """Loader threads for the option `workers`: -1 takes one per core that the process may use, 8 at most."""
    if workers < 0:
        return min(
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_THREADS
        )
    return max(workers, 1)


def partner_window(partners: Literal["auto", "all", "window"], needed_bytes: int) -> int:
    """Return from how many samples of its stripe a mosaic takes partners; 0 for the whole set (bytes: decoded)."""
    if partners == "auto":
        partners = "all" if needed_bytes <= PARTNERS_OF_ALL_BYTES else "window"
    return PARTNER_WINDOW if partners == "window" else 0


class _Loader:
    """What both loaders share: images, threads, buffers, counters, and their end."""

    def __init__(
        self,
        index: Index,
        imgsz: int,
        batch: int,
        workers: int,
        reductions: NDArray[np.int64],
        capacity: int,
        store: Store | None,
        rank: int,
        world: int,
    ) -> None:
        assert len(index) >= 1
        if batch < world:
            raise UserError(f"batch={batch} is less than the {world} devices; give at least one image to each.")
        cv2.setNumThreads(0)  # one thread per picture; OpenCV's own would fight with ours
        self.index = index
        self.imgsz = imgsz
        self.batch_size = batch
        self.rows = rows_of_rank(batch, rank, world)
        self.faults = Faults(index)
        self.counters = Counters()
        self.images = Images(index, store or FileStore(index), reductions, ImageCache(capacity), self.counters)
        self.buffers = Buffers((len(self.rows), imgsz, imgsz, 3), num_kept=PREFETCHED_BATCHES + 2)
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
        images decoded, of images found in the cache, of those that turned out to be broken, and of slow reads.
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

    `config.batch` counts the images of all ranks; this loader delivers the rows of `rank` out of `world`, see
    `rows_of_rank`. Put together they are the same batch for any world, any threads and any cache. `store` is where
    encoded images come from, the index' files where it is None. Raises UserError for a batch smaller than the world.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        augment: AugmentConfig,
        seed: int,
        *,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        reduced = reductions(index.sizes, config.imgsz)
        needed_bytes = decoded_bytes(index.sizes, reduced)
        window = partner_window(augment.partners, needed_bytes)
        at_a_time = -(-window * NUM_STRIPES // world) + (PREFETCHED_BATCHES + 1) * -(-config.batch // world)
        at_a_time = at_a_time if window else 0
        capacity = choose_capacity(
            config.cache, len(index), needed_bytes, otherwise=min(at_a_time, len(index)), what="training"
        )
        super().__init__(index, config.imgsz, config.batch, config.workers, reduced, capacity, store, rank, world)
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
        return self.order.recent(positions, chosen, self.window)

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
        positions = loader.order.positions(self._step)[loader.rows]
        samples, passes = loader.order.at(positions)
        self._draws = augment.draw(loader.seed, passes, samples)
        partners = loader.partners(positions, self._draws)
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
                images = [
                    loader.images.get(source, renew=tile == 0) if source >= 0 else None
                    for tile, source in enumerate(sources)
                ]
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

    `batch` counts the images of all ranks; every image comes to one rank, and all ranks have as many batches. What is
    missing in the last batch, and images that have become unreadable, are grey and have sample -1.
    """

    def __init__(
        self,
        index: Index,
        imgsz: int,
        batch: int,
        workers: int = -1,
        cache: Literal["auto", "none", "ram"] = "none",
        *,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        reduced = reductions(index.sizes, imgsz, dividing=True)
        needed_bytes = decoded_bytes(index.sizes, reduced)
        capacity = 0
        if cache != "none":
            capacity = choose_capacity(cache, len(index), needed_bytes, otherwise=0, what="evaluation")
        super().__init__(index, imgsz, batch, workers, reduced, capacity, store, rank, world)

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
        numbers = step * loader.batch_size + loader.rows
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
