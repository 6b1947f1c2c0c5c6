"""Loader: training batches that are packed on the host and drawn on the device; the same pictures as the host's."""

from __future__ import annotations

import logging
from contextlib import closing
from typing import TYPE_CHECKING

from paceline.data.device.buffers import PackBuffers, usual_bytes
from paceline.data.device.feeder import AHEAD, Feeder
from paceline.data.device.lanes import lane_of
from paceline.data.device.resident import DeviceImages, decoded
from paceline.data.device.streamed import StreamedWork
from paceline.data.device.window import DeviceWindow
from paceline.data.device.work import PackedWork
from paceline.data.loader import PREFETCHED_BATCHES
from paceline.data.work import Schedule

if TYPE_CHECKING:
    from collections.abc import Generator

    import torch

    from paceline.batch import Batch
    from paceline.data.device.codec import Codec
    from paceline.data.device.feeder import Renderer
    from paceline.data.loader import TrainLoader

log = logging.getLogger("paceline")

_TILES = 4


class DeviceLoader:
    """The batches of `loader`, whose images arrive on `device`, in [0, 1] and of type `dtype`.

    With `upload` all decoded images go to the device first, decoded there where there is a `codec`; without, a `codec`
    decodes them as batches need them. The loader stays the caller's to close, and can deliver its own batches as well,
    though not at the same time. Raises UserError where more is asked for than fits.
    """

    def __init__(
        self,
        loader: TrainLoader,
        device: torch.device,
        dtype: torch.dtype,
        renderer: Renderer,
        *,
        upload: bool = False,
        codec: Codec | None = None,
    ) -> None:
        on_cuda = device.type == "cuda"
        self.host = loader
        self.batch_size = loader.batch_size
        self._resident: DeviceImages | None = None
        if upload:
            self._resident = (
                DeviceImages.of(loader.decoded_set(), device) if codec is None else decoded(loader, codec, device)
            )
            log.info("cache=device: %.2f GB of decoded images are on %s.", self._resident.pixels.nbytes / 1e9, device)
        lane = lane_of(device)
        self._window: DeviceWindow | None = None
        if codec is not None and not upload:
            self._window = DeviceWindow(loader, codec, device, lane)
            num_bytes = self._window.pixels.nbytes
            log.info("%s decodes, and has %.2f GB for images that are needed again soon.", device, num_bytes / 1e9)
        extents = -(-loader.index.sizes.astype("int64") // loader.images.reductions[:, None])
        largest = 0 if upload or codec is not None else 3 * int(extents.prod(axis=1).max())
        self._ahead = AHEAD if on_cuda else 0
        self._buffers = PackBuffers(
            usual_bytes(len(loader.rows), loader.imgsz, _TILES, largest),
            PREFETCHED_BATCHES + self._ahead + 2,
            pinned=on_cuda,
        )
        there = self._resident if self._window is None else self._window
        self._feeder = Feeder(lane, renderer, dtype, None if there is None else there.pixels, self._ahead)

    @property
    def decodes(self) -> bool:
        """Whether the device decodes images as they come."""
        return self._window is not None

    def first_step(self, epoch: int) -> int:
        """Return the number of the first step of an epoch."""
        return self.host.first_step(epoch)

    def steps(self, epoch: int) -> int:
        """Count the batches of an epoch."""
        return self.host.steps(epoch)

    def stats(self) -> dict[str, float]:
        """Return the loader's sums since the start, by name; `render_s` counts the seconds of packing."""
        return self.host.stats()

    def epoch(self, epoch: int, *, mosaic: bool, start_step: int | None = None) -> Generator[Batch, None, None]:
        """Batches of an epoch, in order, from `start_step` (a number of the whole run) where it is given.

        Raises UserError when more than 1 % of the images have become unreadable.
        """
        loader = self.host
        if self._window is not None:
            yield from self._streamed(self._window, loader.span(epoch, start_step), mosaic=mosaic)
            return
        images = loader.images.decoded_set() if self._resident is None else None
        steps = loader.span(epoch, start_step)
        schedule = Schedule(loader, steps, mosaic=mosaic, on_device=True)
        works = (
            PackedWork(loader, schedule, step, self._buffers, images=images, on_device=self._resident) for step in steps
        )
        with closing(loader.stream(works)) as packed:
            yield from self._feeder.feed(packed, loader.ready)

    def forget(self) -> None:
        """Let go of the images that were decoded for batches to come, so that they are decoded again."""
        if self._window is not None:
            self._window.forget()

    def let_go(self) -> None:
        """Give back all memory, page-locked and on the device, whoever still holds this; it delivers nothing more."""
        self._window = self._resident = None
        self._feeder.let_go()
        self._buffers = PackBuffers(0, 0, pinned=False)

    def _streamed(self, window: DeviceWindow, steps: range, *, mosaic: bool) -> Generator[Batch, None, None]:
        loader = self.host
        schedule = Schedule(loader, steps, mosaic=mosaic, on_device=True)
        works = (StreamedWork(loader, schedule, step, self._buffers, window.files) for step in steps)
        with closing(loader.stream(works)) as streamed:
            yield from self._feeder.feed(map(window.bring, streamed), loader.ready)
