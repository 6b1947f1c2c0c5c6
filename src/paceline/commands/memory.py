"""Memory: the batch that fits into it, and what a run says when it ran out all the same."""

from __future__ import annotations

import logging
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.batch import Batch
from paceline.data import room
from paceline.data.decode import reductions
from paceline.data.sizes import sizes_of
from paceline.data.targets import boxes_of, bucket
from paceline.errors import UserError
from paceline.parallel.exhaustion import describe_memory, is_out_of_memory
from paceline.parallel.gather import of_all
from paceline.training.auto_batch import FIRST, choose
from paceline.training.peak import peak_of
from paceline.training.rehearsal import RehearsalMeter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from paceline.data.config import AugmentConfig, DataConfig
    from paceline.data.index import Index
    from paceline.parallel.rank import Rank
    from paceline.training.auto_batch import Choice, Line
    from paceline.training.peak import Peak
    from paceline.training.precision import Precision
    from paceline.training.understudy import Cast

log = logging.getLogger("paceline")

USUAL_BATCH = 16
"""Of all devices together: speed alone never chooses fewer images, since batch norms want some."""
LEAST_STEPS = 32
"""Of an epoch: beyond the nominal batch, more images per step would make too few updates of them."""
PATIENCE_S = 30.0
"""After so long the search ends with what it has."""
_LOADED_BATCHES = 10
"""That both loaders together hold in the host's memory."""
_MOSAIC, _MIXED = 4, 2
_CACHED_SHARE = 0.75
"""Of the free memory: caches that choose for themselves take no more."""
_SAFE_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The answer of `batch=auto`, for all devices, and what it rests on."""

    batch: int
    line: Line | None
    room_bytes: int
    """What a device may hold."""


@dataclass(frozen=True, kw_only=True)
class FittingBatch:
    """Measures how many images a step should have. Every rank does it, on its own device."""

    cast: Cast
    precision: Precision
    data: DataConfig
    augment: AugmentConfig
    train_index: Index
    val_index: Index
    device: torch.device
    rank: Rank
    nbs: int
    """Nominal batch."""
    beside: bool = False
    """Whether evaluation runs while training goes on."""

    def find(self) -> Fitted:
        """Measure, agree on the smallest answer of all ranks, and say in the log what it rests on."""
        world, start = self.rank.world, time.monotonic()
        peak = peak_of(self.device)
        peak.held_bytes()  # gives back what nobody uses
        free_bytes = min(of_all(peak.free_bytes()))  # before anyone takes any
        sharers = of_all((self.rank.host, str(self.device))).count((self.rank.host, str(self.device)))
        room_bytes = self._room_bytes(peak, free_bytes, sharers)
        usual = max(USUAL_BATCH // world, 1)
        choice = choose(
            self._meter(peak),
            room_bytes=room_bytes,
            most=max(most_images(len(self.train_index), self.nbs) // world, 1),
            usual=usual,
            first=FIRST if self.device.type == "cpu" else max(usual // 2, FIRST),  # each size costs a GPU seconds
            is_late=lambda: time.monotonic() - start > PATIENCE_S,
        )
        peak.held_bytes()
        answers = of_all((choice, room_bytes))
        choice, room_bytes = min(answers, key=lambda answer: answer[0].images)
        fitted = Fitted(batch=choice.images * world, line=choice.line, room_bytes=room_bytes)
        if self.rank.is_main:
            log.info("%s", describe(choice, room_bytes, world, seconds=time.monotonic() - start))
        return fitted

    def _meter(self, peak: Peak) -> RehearsalMeter:
        largest = max(sizes_of(self.data.imgsz, self.augment.multi_scale))
        on_host = self.device.type == "cpu"
        return RehearsalMeter(
            cast=self.cast,
            precision=self.precision,
            peak=peak,
            training=lambda images: densest_batch(self.train_index, self.augment, images, largest),
            evaluation=lambda images: densest_batch(self.val_index, None, images, self.data.imgsz),
            beside=self.beside,
            further_bytes=_LOADED_BATCHES * 3 * largest**2 if on_host else 0,
        )

    def _room_bytes(self, peak: Peak, free_bytes: int, sharers: int) -> int:
        """Count what this process may hold: what it does, and a share of what is free once images have their place."""
        needed_bytes = self._cache_bytes(free_bytes)
        free_bytes = max(free_bytes - needed_bytes, 0)
        return peak.held_bytes() + int(self.data.memory * free_bytes / sharers)

    def _cache_bytes(self, free_bytes: int) -> int:
        """Count what decoded images will take where the network is, at most."""
        largest = max(sizes_of(self.data.imgsz, self.augment.multi_scale))
        train = room.decoded_bytes(self.train_index.sizes, reductions(self.train_index.sizes, largest))
        if self.device.type != "cpu":
            return train if self.data.cache == "device" else 0
        val_sizes = self.val_index.sizes
        val = room.decoded_bytes(val_sizes, reductions(val_sizes, self.data.imgsz, dividing=True))
        if self.data.cache == "ram":
            return train + val
        return min(train + val, int(_CACHED_SHARE * free_bytes)) if self.data.cache == "auto" else 0


def most_images(num_images: int, nbs: int) -> int:
    """Images of a step beyond which nothing is measured: of a set, and for a nominal batch."""
    return min(num_images, max(nbs, num_images // LEAST_STEPS))


def densest_batch(index: Index, augment: AugmentConfig | None, images: int, size: int) -> Batch:
    """Make a batch that needs as much memory as any of the index can: noise with the boxes of its fullest images.

    augment: what may put several images into one picture; None for one image in each.
    """
    rows, owners = boxes_of(index, np.arange(len(index)))
    counts = np.bincount(owners, minlength=len(index))
    starts = np.cumsum(counts) - counts
    together = 1 if augment is None else _images_in_a_picture(augment)
    fullest = np.argsort(-counts, kind="stable")[np.arange(images) % len(index)]
    num_boxes = bucket(int(counts.max(initial=0)) * together)
    random = np.random.default_rng(0)
    boxes = np.zeros((images, num_boxes, 4), np.float32)
    labels = np.zeros((images, num_boxes), np.int64)
    valid = np.zeros((images, num_boxes), np.bool_)
    for number, image in enumerate(fullest):
        mine = np.tile(rows[starts[image] : starts[image] + counts[image]], together)
        own = index.boxes[mine]
        sides = np.minimum((own[:, 2:] - own[:, :2]) * (size / max(index.sizes[image])), size)
        corners = random.random((len(mine), 2)) * (size - sides)
        boxes[number, : len(mine)] = np.concatenate([corners, corners + sides], axis=1)
        labels[number, : len(mine)] = index.labels[mine]
        valid[number, : len(mine)] = True
    pixels = torch.from_numpy(random.integers(0, 256, (images, size, size, 3), np.uint8))
    return Batch(
        images=pixels.permute(0, 3, 1, 2),
        boxes=torch.from_numpy(boxes),
        labels=torch.from_numpy(labels),
        valid=torch.from_numpy(valid),
        samples=torch.from_numpy(fullest.astype(np.int64)),
        original_hw=torch.full((images, 2), size),
    )


def _images_in_a_picture(augment: AugmentConfig) -> int:
    """Count the images whose boxes one picture may hold."""
    several = _MOSAIC if augment.mosaic > 0 else 1
    mixed = several * (_MIXED if augment.mixup > 0 or augment.cutmix > 0 else 1)
    return mixed + (1 if augment.copy_paste > 0 else 0)


def held_bytes(network: torch.nn.Module, device: torch.device, *, states: int) -> int:
    """Bytes of a GPU that images do not change: what is held before the first step, and then gradients and `states`.

    states: what the optimiser keeps of the size of each parameter. 0 on a host, where nobody has counted.
    """
    if device.type != "cuda":
        return 0
    trained = sum(value.numel() * value.element_size() for value in network.parameters() if value.requires_grad)
    return torch.cuda.memory_allocated(device) + (1 + states) * trained


def describe(choice: Choice, room_bytes: int, devices: int, *, seconds: float) -> str:
    """Say what was chosen and why, with the numbers."""
    by_size = {trial.images: trial for trial in choice.trials}
    chosen = by_size[choice.images]
    each = f" ({choice.images} on each of {devices} devices)" if devices > 1 else ""
    others = "; ".join(
        f"{trial.images}: {trial.peak_bytes / 1e9:.1f} GB, {trial.images_per_s:.0f} images/s"
        for trial in choice.trials
        if trial is not chosen
    )
    end = {
        "memory": "more would not fit",
        "speed": "no faster beyond",
        "images": f"more would be all images, or beyond nbs and under {LEAST_STEPS} steps to an epoch",
        "time": f"no larger one was tried after {PATIENCE_S:.0f} s",
    }[choice.limit]
    return (
        f"batch={choice.images * devices}{each}, chosen in {seconds:.0f} s: {chosen.peak_bytes / 1e9:.1f} GB of the "
        f"{room_bytes / 1e9:.1f} GB that a device may take, {chosen.images_per_s * devices:.0f} images/s, {end}"
        + (f" (of one device, {others})." if others else ".")
    )


@dataclass(frozen=True, kw_only=True)
class Exhaustion:
    """What is known of the memory of a run whose batch may turn out to be too large."""

    batch: int
    unit: int
    """What a batch has to be a multiple of: the ranks, or more where they cut it."""
    device: torch.device
    rank: Rank
    fitted: Fitted | None = None
    """The answer of `batch=auto`, where that was asked for."""

    @contextmanager
    def explained(self, held_bytes: int, has_stepped: Callable[[], bool]) -> Iterator[None]:
        """Turn running out of memory in the body into one sentence that names the batch that fits.

        held_bytes: by weights, their gradients, the average and the optimiser's state, which images do not change.
        has_stepped: whether a step has come to its end, so that the peak is one of a whole step.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(self.sentence(self._measured(held_bytes) if has_stepped() else self._fitted())) from error

    def sentence(self, measured: int | None) -> str:
        """Say who ran out of memory, and what to do; `measured` is how many images should fit."""
        who = f"Rank {self.rank.rank} on {self.rank.host}" if self.rank.world > 1 else "The run"
        said = f"{who} needs more than {describe_memory(self.device)} for batch={self.batch}"
        if self.batch <= self.unit:
            return f"{said}, and {self.unit} is the least here; take a smaller imgsz or model."
        images = self.batch // 2 if measured is None else min(measured, self.batch - 1)
        fits = max(images // self.unit, 1) * self.unit
        why = "half of it" if measured is None else "which should fit by what was measured"
        return f"{said}; take batch={fits}, {why}: below nbs, gradients add up to the same update."

    def _fitted(self) -> int | None:
        """Images that fit by the line of `batch=auto`; None without it."""
        if self.fitted is None or self.fitted.line is None:
            return None
        return self.fitted.line.images_in(_SAFE_SHARE * self.fitted.room_bytes) * self.rank.world

    def _measured(self, held_bytes: int) -> int | None:
        """Images that fit by the peak of the steps that did; None where nobody has looked."""
        if self.device.type != "cuda":
            return self._fitted()
        peak_bytes = torch.cuda.max_memory_allocated(self.device)
        available_bytes = torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)
        return fitting_images(self.batch, held_bytes, peak_bytes, available_bytes)


def fitting_images(images: int, held_bytes: int, peak_bytes: int, available_bytes: int) -> int | None:
    """Images of a step that fit, by the line from what is held without any to the peak with so many.

    The peak counts as no less than what was available, since a step has failed. None for a peak that is none.
    """
    if peak_bytes <= held_bytes:
        return None
    per_image = (max(peak_bytes, available_bytes) - held_bytes) / images
    return max(int((_SAFE_SHARE * available_bytes - held_bytes) / per_image), 0)
