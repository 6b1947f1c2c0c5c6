"""The loader alone and the training end to end under the stopwatch, on the way that batches take in training."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import fields
from typing import TYPE_CHECKING

import torch

from paceline.batch import Batch
from paceline.parallel.gather import from_first
from paceline.planning.record import DataRecord
from paceline.planning.spread import Spread

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from paceline.commands.run_data import RunData
    from paceline.data.loader import TrainLoader
    from paceline.training.loop import TrainingData
    from paceline.training.plan import StepPlan

WINDOWS = 8
"""Stretches that the time is divided into; each gives one figure."""
_PROBED = 4


class DataBench:
    """The batches of a data set as training gets them, for as long as the context lasts."""

    def __init__(self, run_data: RunData, plan: StepPlan, device: torch.device, name: str) -> None:
        self._loader: TrainLoader = run_data.train_loader()
        self._device = device
        self._name = name
        self._images = len(run_data.train_index)
        self._is_drawn_there = False
        try:
            self._source: TrainingData = run_data.on_device(self._loader, plan)
        except BaseException:
            self._loader.close()
            raise

    def __enter__(self) -> DataBench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._loader.close()

    def first_batch(self) -> Batch:
        """Return a batch of the set on the device, in memory of its own."""
        with closing(self._stream()) as stream:
            batch = next(stream)
            return Batch(**{entry.name: getattr(batch, entry.name).clone() for entry in fields(Batch)})

    def measure(self, take: Callable[[Batch], object], budget_s: float) -> DataRecord:
        """Time the loader alone and with `take` for each batch, about `budget_s` each, once the cache is filled.

        With several ranks all of them come here; rates are those of all together.
        """
        loader_s, _ = self._windows(lambda batch: batch.network_input(), budget_s, warms_up=True)
        whole_s, waited = self._windows(take, budget_s, warms_up=False)
        return DataRecord(
            data=self._name,
            images=self._images,
            drawn_by="device" if self._is_drawn_there else "host",
            loader_images_per_s=Spread.of(loader_s).rate(self._source.batch_size),
            images_per_s=Spread.of(whole_s).rate(self._source.batch_size),
            waiting_share=Spread.of(waited),
        )

    def _windows(
        self, take: Callable[[Batch], object], budget_s: float, *, warms_up: bool
    ) -> tuple[list[float], list[float]]:
        """Return seconds per batch, and the share of them spent in waiting for batches, of each stretch.

        warms_up: take all batches of one pass first, though for no longer than the budget, twice.
        """
        with closing(self._stream()) as stream:
            probe_s, _ = self._stretch(stream, take, _PROBED)
            a_pass = min(self._source.steps(0), 1 + int(2 * budget_s / probe_s)) if warms_up else _PROBED
            per_window, a_pass = from_first((max(1, int(budget_s / WINDOWS / probe_s)), a_pass))
            if warms_up:
                self._stretch(stream, take, a_pass)
                probe_s, _ = self._stretch(stream, take, _PROBED)
                per_window = from_first(max(1, int(budget_s / WINDOWS / probe_s)))
            found = [self._stretch(stream, take, per_window) for _ in range(WINDOWS)]
        return [seconds for seconds, _ in found], [share for _, share in found]

    def _stretch(
        self, stream: Generator[Batch, None, None], take: Callable[[Batch], object], number: int
    ) -> tuple[float, float]:
        """Take `number` batches; returns seconds per batch and the share of waiting for them."""
        waited_s = 0.0
        self._settle()
        start = time.perf_counter()
        for _ in range(number):
            asked = time.perf_counter()
            batch = next(stream)
            waited_s += time.perf_counter() - asked
            take(batch)
        self._settle()
        wall_s = time.perf_counter() - start
        return wall_s / number, waited_s / wall_s

    def _stream(self) -> Generator[Batch, None, None]:
        """Deliver the batches of all epochs, as long as anybody asks, on the device."""
        epoch = 0
        while True:
            for batch in self._source.epoch(epoch, mosaic=True):
                self._is_drawn_there = batch.images.is_floating_point()  # the host draws bytes
                yield batch.to(self._device, non_blocking=True)
            epoch += 1

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
