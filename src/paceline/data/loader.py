"""Loader: batches from an index, made ahead by threads: augmented for training, letterboxed for evaluation."""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Literal, Self, TypeVar

import cv2
import numpy as np

from paceline.data import augment, paste, room
from paceline.data.buffers import Buffers
from paceline.data.decode import reductions
from paceline.data.faults import COUNTED_AS_MISSED, REPLACED, Faults
from paceline.data.images import BrokenImage, Counters, Images
from paceline.data.order import NUM_STRIPES, Order, rows_of_rank
from paceline.data.pack.store import store_of
from paceline.data.prefetch import Prefetcher
from paceline.data.render import Workspace
from paceline.data.sizes import rect_shapes, sizes_of
from paceline.data.work import EvalWork, Schedule, TrainWork
from paceline.errors import UserError
from paceline.letterbox import Letterbox

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from concurrent.futures import Executor

    from numpy.typing import NDArray

    from paceline.batch import Batch
    from paceline.data.config import AugmentConfig, DataConfig
    from paceline.data.images import DecodedSet
    from paceline.data.index import Index
    from paceline.data.prefetch import Work
    from paceline.data.store import Store
    from paceline.data.tiers import Choice, Purpose
    from paceline.data.user_transform import UserTransform

log = logging.getLogger("paceline")

T = TypeVar("T")

PREFETCHED_BATCHES = 3
PARTNERS_OF_ALL_BYTES = 4_000_000_000
"""Part of the recipe: mosaic partners come from the whole set when it needs no more than this decoded."""
PARTNER_WINDOW = 16
"""Part of the recipe: from larger sets, partners come from this many samples that came before in the same stripe."""
_MOST_THREADS = 8


def num_threads(workers: int, processes: int = 1) -> int:
    """Loader threads for the option `workers`: -1 takes one per core that the process may use, 8 at most.

    processes: how many of them share these cores, as the ranks of a machine do.
    """
    if workers < 0:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(cores // processes, _MOST_THREADS))
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
        store: Store | None,
        rank: int,
        world: int,
        *,
        cache: Choice,
        num_recent: int,
        what: Purpose,
        pinned: bool,
    ) -> None:
        assert len(index) >= 1
        if batch < world:
            raise UserError(f"batch={batch} is less than the {world} devices; give at least one image to each.")
        cv2.setNumThreads(0)  # one thread per picture; OpenCV's own would fight with ours
        self.index = index
        self.imgsz = imgsz
        self.batch_size = batch
        self.rows = rows_of_rank(batch, rank, world)
        self.num_threads = num_threads(workers)
        self.faults = Faults(index, REPLACED if what == "training" else COUNTED_AS_MISSED)
        self.counters = Counters()
        self.num_recent = min(num_recent, len(index))
        """Images that are needed again soon, and so stay for a while where not all are kept."""
        self.images = Images(
            index,
            store or store_of(index),
            reductions,
            self.counters,
            cache=cache,
            num_recent=self.num_recent,
            num_threads=self.num_threads,
            world=world,
            what=what,
        )
        self.buffers = Buffers((len(self.rows), imgsz, imgsz, 3), num_kept=PREFETCHED_BATCHES + 2, pinned=pinned)
        self._pinned = pinned
        self._other_buffers: dict[tuple[int, int], Buffers] = {}
        self._prefetcher = Prefetcher(self.num_threads, PREFETCHED_BATCHES)
        self._local = threading.local()

    def workspace(self, size: int) -> Workspace:
        """Buffers of the calling thread for pictures of one size."""
        found: dict[int, Workspace] = self._local.__dict__.setdefault("workspaces", {})
        if size not in found:
            found[size] = Workspace(size)
        return found[size]

    def take_buffer(self, height: int, width: int) -> NDArray[np.uint8]:
        """Memory for a batch of pictures of one shape."""
        if (height, width) == (self.imgsz, self.imgsz):
            return self.buffers.take()
        others = self._other_buffers
        if (height, width) not in others:
            shape = (len(self.rows), height, width, 3)
            others[height, width] = Buffers(shape, num_kept=PREFETCHED_BATCHES + 2, pinned=self._pinned)
        return others[height, width].take()

    @property
    def pool(self) -> Executor:
        """The threads that make the batches, for what somebody else has to be done beside them."""
        return self._prefetcher.pool

    @property
    def num_parts(self) -> int:
        """Parts of a batch that threads make beside each other: a few for each thread, for each costs some calls."""
        return min(len(self.rows), 2 * self.num_threads)

    def stats(self) -> dict[str, float]:
        """Return sums since the start, by name.

        Seconds that threads spent decoding and rendering (all threads together), and the consumer waiting; numbers of
        images decoded, of images found in the cache, of those that turned out to be broken, and of slow reads.
        """
        sums = self.counters.read()
        sums["cache_hits"] = max(sums.pop("images") - sums["decodes"], 0.0)
        return sums

    def stream(self, works: Iterable[Work[T]]) -> Generator[T, None, None]:
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

    def ready(self) -> bool:
        """Whether the next batch is there, so that nobody has to wait for it."""
        return self._prefetcher.ready()

    def take_out(self, broken: BrokenImage) -> None:
        """Count and name a broken image. Raises UserError when there are too many."""
        self.counters.add(broken=float(self.faults.add(broken.number, broken.reason)))

    def close(self) -> None:
        """Stop the threads, wait for their end, leave the cache; a closed loader delivers nothing more."""
        self._prefetcher.close()
        self.images.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class TrainLoader(_Loader):
    """Augmented batches of the endless stream of samples; a pure function of (index, configs, seed, step).

    `config.batch` counts the images of all ranks; this loader delivers the rows of `rank` out of `world`, see
    `rows_of_rank`. Put together they are the same batch for any world, any threads and any cache. `store` is where
    encoded images come from, the index' files where it is None. `on_device` says that the pictures are made on a GPU
    from `decoded_set`; `pinned` asks for page-locked images, see `Buffers`. Raises UserError for a batch smaller than
    the world, and for cache=device without `on_device`.
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
        on_device: bool = False,
        pinned: bool = False,
        transform: UserTransform | None = None,
    ) -> None:
        if config.cache == "device" and not on_device:
            raise UserError(
                "cache=device keeps the images on a GPU that makes the pictures, but here the host makes them; choose "
                "cache=ram, or cache=auto."
            )
        self.sizes = sizes_of(config.imgsz, augment.multi_scale)
        self.transform = transform
        if index.packed is not None and config.imgsz <= index.packed.pack.imgsz < max(self.sizes):
            raise UserError(
                f"{index.packed.pack.address} holds images that were reduced for imgsz={index.packed.pack.imgsz}, so "
                f"multi_scale={augment.multi_scale:g}, which goes up to {max(self.sizes)} px, has too few pixels; "
                f"choose multi_scale=0, or pack the data set again with --imgsz {max(self.sizes)}."
            )
        reduced = reductions(index.sizes, max(self.sizes))
        window = partner_window(augment.partners, room.decoded_bytes(index.sizes, reduced))
        at_a_time = -(-window * NUM_STRIPES // world) + (PREFETCHED_BATCHES + 1) * -(-config.batch // world)
        super().__init__(
            index,
            config.imgsz,
            config.batch,
            config.workers,
            reduced,
            store,
            rank,
            world,
            cache=config.cache,
            num_recent=at_a_time if window else 0,
            what="training",
            pinned=pinned,
        )
        if window == 0 and augment.mosaic > 0 and self.images.shelf.tier in ("none", "encoded"):
            log.info(
                "Mosaics take partners from the whole set, and decoded images are not kept: up to four are decoded "
                "for each picture. cache=ram or cache=disk avoids that, and so does partners=window, with other "
                "partners."
            )
        self.order = Order(len(index), config.batch, seed)
        self.config = paste.usable(augment, index)
        self.seed = seed
        self.window = window

    def first_step(self, epoch: int) -> int:
        """Return the number of the first step of an epoch; a run in its middle goes on from a higher one."""
        return self.order.steps_until_pass(epoch)

    def steps(self, epoch: int) -> int:
        """Count the batches of an epoch; it has none when a batch holds several passes and an earlier epoch took it."""
        return self.first_step(epoch + 1) - self.first_step(epoch)

    def epoch(self, epoch: int, *, mosaic: bool, start_step: int | None = None) -> Generator[Batch, None, None]:
        """Batches of an epoch, in order, from `start_step` (a number of the whole run) where it is given.

        Nothing before it is drawn or read. Raises UserError when more than 1 % of the images have become unreadable.
        """
        steps = self.span(epoch, start_step)
        schedule = Schedule(self, steps, mosaic=mosaic)
        return self.stream(TrainWork(self, schedule, step) for step in steps)

    def span(self, epoch: int, start_step: int | None = None) -> range:
        """Return the steps of an epoch, as numbers of the whole run, from `start_step` where it is given."""
        return range(self.first_step(epoch) if start_step is None else start_step, self.first_step(epoch + 1))

    def partners(self, positions: NDArray[np.int64], draws: NDArray[np.float64]) -> NDArray[np.int64]:
        """Partners B(T - 1), for all tiles but the first, of the samples at `positions` B of the stream."""
        chosen = augment.partner_draws(self.config, draws)
        if self.window == 0:
            return augment.partners_of_all(chosen, len(self.index))
        return self.order.recent(positions, chosen, self.window)

    def plan(
        self, draws: NDArray[np.float64], images: NDArray[np.int64], *, size: int, mosaic: bool
    ) -> augment.Transforms:
        """Make the transforms of pictures of `size` px from their random numbers BS and images BT."""
        return augment.plan(
            self.config,
            size,
            draws,
            images,
            self.index.sizes[images],
            self.images.reductions[images],
            mosaic=mosaic,
        )

    def decoded_set(self) -> DecodedSet:
        """Decode all images that are not there yet, in all threads, and return them as they lie in memory.

        Raises UserError where they do not fit, or too many are broken.
        """

        def bring(number: int) -> None:
            try:
                self.images.get(number)
            except BrokenImage as broken:
                self.take_out(broken)

        with ThreadPoolExecutor(self.num_threads, thread_name_prefix="paceline-data") as pool:
            for _ in pool.map(bring, range(len(self.index))):
                pass
        found = self.images.decoded_set()
        if found is None:
            raise UserError(
                "cache=device needs the decoded set in the host's memory first, and it does not fit; choose cache=auto."
            )
        return found


class EvalLoader(_Loader):
    """All images of an index in its order, letterboxed to `imgsz` x `imgsz`, in full batches.

    With `rect` they come from wide to tall, in rectangles of a few shapes that hold them with little grey.

    `batch` counts the images of all ranks; every image comes to one rank, and all ranks have as many batches. What is
    missing in the last batch, and images that have become unreadable, are grey and have sample -1. cache=device is
    that of training: here it is cache=auto.
    """

    def __init__(
        self,
        index: Index,
        imgsz: int,
        batch: int,
        workers: int = -1,
        cache: Choice = "none",
        *,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
        pinned: bool = False,
        rect: bool = False,
    ) -> None:
        super().__init__(
            index,
            imgsz,
            batch,
            workers,
            reductions(index.sizes, imgsz, dividing=True),
            store,
            rank,
            world,
            cache="auto" if cache == "device" else cache,
            num_recent=0,
            what="evaluation",
            pinned=pinned,
        )
        if rect:
            self.order, self.shapes = rect_shapes(index.sizes, imgsz, batch)
        else:
            self.order = np.arange(len(index))
            self.shapes = np.full((-(-len(index) // batch), 2), imgsz)
        self._places = np.empty(len(index), np.int64)
        self._places[self.order] = np.arange(len(index))

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.shapes)

    def __iter__(self) -> Iterator[Batch]:
        return self.stream(EvalWork(self, step) for step in range(len(self)))

    def geometry(self, number: int) -> Letterbox:
        """How image `number` lies in its picture."""
        height, width = self.index.sizes[number].tolist()
        return Letterbox.fit(height, width, *self.shapes[self._places[number] // self.batch_size].tolist())
