"""Micro-batches: an engine of one process whose step goes on in smaller pieces where its memory does not suffice.

```
batch 16                       fails somewhere: nothing of it counts
 8 | 8                         fails again
 4 | 4 | 4 | 4                 fits; the next batches start here
```

A step that fails in the middle has added a part of its gradients and statistics. So what came before it in the same
update is run again from nothing: the batches since the last update are kept for that, and of what came past this
engine (a run that goes on, a graph that was replayed) a copy is made before anything is added to it. While a graph is
recorded it stands aside.
"""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError
from paceline.losses.detection import LossSums
from paceline.parallel.exhaustion import describe_memory, is_out_of_memory

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

    from paceline.batch import Batch
    from paceline.parallel.parts import Parts
    from paceline.parallel.single import SingleEngine

log = logging.getLogger("paceline")

STRIDE_PX = 32
"""Of the coarsest maps: a norm there sees one value per image of this side."""


def divide(images: int, *, most: int, least: int) -> list[int]:
    """Cut a number of images into as few parts as possible of at most `most`, as equal as possible.

    No part is below `least`, even where parts above `most` follow from that; only a batch that is itself, is.
    """
    parts = min(-(-images // max(most, 1)), max(images // least, 1))
    short, longer = divmod(images, parts)
    return [short + 1] * longer + [short] * (parts - longer)


@dataclass(frozen=True, kw_only=True)
class _Random:
    """State of torch's random numbers, of the host and of one device."""

    host: Tensor
    device: Tensor | None

    @classmethod
    def of(cls, device: torch.device) -> _Random:
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(host=torch.get_rng_state(), device=on_device)

    def put_back(self, device: torch.device) -> None:
        torch.set_rng_state(self.host)
        if self.device is not None:
            torch.cuda.set_rng_state(self.device, device)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A batch of the present update, as it was run."""

    batch: Batch
    completes: bool
    share: float
    random: _Random


class _Copy:
    """What an engine had accumulated at some moment."""

    def __init__(self, engine: SingleEngine, trained: list[nn.Parameter]) -> None:
        self._engine, self._trained = engine, trained
        self._state = [value.clone() for value in engine.state()]
        self._gradients = [None if parameter.grad is None else parameter.grad.clone() for parameter in trained]

    @torch.no_grad()
    def put_back(self) -> None:
        """Go back to that moment; may be done again."""
        torch._foreach_copy_(self._engine.state(), self._state)
        for parameter, gradient in zip(self._trained, self._gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()


class _Window:
    """What was accumulated since the last update, so that it can be accumulated again."""

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.before: _Copy | None = None
        """What was there when the first entry came; None for nothing."""


class MicroBatches:
    """A `SingleEngine` that retries a step which ran out of memory, in micro-batches, as if it had begun with them.

    Nothing of a failed try stays: not in gradients and sums, not in the statistics of norms, not in random states. The
    gradient of the micro-batches is that of the whole batch (decision 2) but for what batch norms normalise by.
    """

    def __init__(self, inner: SingleEngine) -> None:
        self.inner = inner
        self.parts: Parts = inner.parts
        self.is_capturable = inner.is_capturable
        self._trained = [parameter for parameter in inner.network.parameters() if parameter.requires_grad]
        self._window = _Window()
        self._most_px: int | None = None
        """Pixels of the largest micro-batch that is tried; None while all batches go whole."""
        self._said: set[int] = set()
        self._stands_aside = False

    @property
    def network(self) -> nn.Module:
        """The network, whose parameters receive the gradients."""
        return self.inner.network

    def accumulate(self, batch: Batch, *, completes: bool = True, share: float = 1.0) -> LossSums:
        """Run one batch forward and backward; returns its detached sums, on the device.

        Raises UserError where not even one image fits.
        """
        if self._stands_aside:
            return self._in_parts(batch, completes=completes, share=share)
        if not self._window.entries and any(parameter.grad is not None for parameter in self._trained):
            self._window.before = _Copy(self.inner, self._trained)
        entry = _Entry(batch=batch, completes=completes, share=share, random=_Random.of(self.inner.device))
        entries, tried_px = [*self._window.entries, entry], self._most_px
        sums = self._try([entry])
        while sums is None:
            self._start_again(entries[0])
            sums = self._try(entries)
        if self._most_px != tried_px:
            self._say(batch)
        if completes:  # the gradient comes next, so nothing has to be kept
            self._window = _Window()
        else:
            self._window.entries.append(entry)
        return sums

    @contextmanager
    def unwatched(self) -> Iterator[None]:
        """Surround what is no step of the run, and fails as it fails, or what happens past this engine."""
        self._stands_aside = True
        try:
            yield
        finally:
            self._stands_aside = False
            self._window = _Window()

    def gradient(self) -> Tensor:
        """Divide the summed gradients once, clip them, and say whether they are finite (0.0) or not (1.0)."""
        if not self._stands_aside:
            self._window = _Window()
        return self.inner.gradient()

    def state(self) -> list[Tensor]:
        """Return every tensor that these two change in place, beside the network's own and the gradients."""
        return self.inner.state()

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing."""
        return self.inner.pending()

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `pending` gave."""
        self.inner.load_pending(tensors)
        self._window = _Window()

    def _try(self, entries: list[_Entry]) -> LossSums | None:
        """Accumulate these batches; returns the sums of the last one, None where memory ran out."""
        sums: LossSums | None = None
        for entry in entries:
            try:
                sums = self._in_parts(entry.batch, completes=entry.completes, share=entry.share)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(entry.batch, error)
                return None
        return sums

    def _in_parts(self, batch: Batch, *, completes: bool, share: float) -> LossSums:
        sums, start = None, 0
        sizes = self._sizes(batch)
        if len(sizes) == 1:
            return self.inner.accumulate(batch, completes=completes, share=share)
        for number, size in enumerate(sizes, start=1):
            part = batch.rows(start, start + size)
            is_last = number == len(sizes)
            of_part = self.inner.accumulate(part, completes=completes and is_last, share=share * size / len(batch))
            sums = of_part if sums is None else _added(sums, of_part)
            start += size
        assert sums is not None
        return sums

    def _sizes(self, batch: Batch) -> list[int]:
        height, width = batch.size_hw
        least = 2 if height * width <= STRIDE_PX**2 else 1  # one value per channel has no variance
        most = len(batch) if self._most_px is None else self._most_px // (height * width)
        return divide(len(batch), most=most, least=least)

    def _shrink(self, batch: Batch, error: BaseException) -> None:
        """Halve the micro-batches that this batch is cut into; raises UserError where they cannot be smaller."""
        height, width = batch.size_hw
        sizes = self._sizes(batch)
        self._most_px = -(-len(batch) // (2 * len(sizes))) * height * width
        if len(self._sizes(batch)) == len(sizes):
            images = "image" if sizes[0] == 1 else "images"
            raise UserError(
                f"The step does not even fit into {describe_memory(self.inner.device)} with {sizes[0]} {images} of "
                f"{width} x {height} px; take a smaller imgsz or model, or end what else takes memory."
            ) from error

    def _start_again(self, first: _Entry) -> None:
        """Go back to where the window began; to be called when no exception holds on to the failed try any more."""
        gc.collect()
        if self.inner.device.type == "cuda":
            torch.cuda.empty_cache()
        self.inner.drop()
        if self._window.before is not None:
            self._window.before.put_back()
        first.random.put_back(self.inner.device)

    def _say(self, batch: Batch) -> None:
        size = max(self._sizes(batch))
        if size in self._said:
            return
        self._said.add(size)
        log.warning(
            "Out of memory with %d images of %d px: this step and the next ones go in micro-batches of %d, whose "
            "gradients add up to the same; set batch=%d (and nbs to %d or more, which is accumulated up to) to start "
            "with them.",
            len(batch),
            max(batch.size_hw),
            size,
            size,
            len(batch),
        )


def _added(first: LossSums, second: LossSums) -> LossSums:
    return LossSums(
        box=first.box + second.box,
        cls=first.cls + second.cls,
        dfl=first.dfl + second.dfl,
        normaliser=first.normaliser + second.normaliser,
    )
