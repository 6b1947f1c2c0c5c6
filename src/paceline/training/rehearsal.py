"""A rehearsal: whole steps of training, and the answers of an evaluation, on copies; the run's own state stays."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from paceline.models.fusion import fuse
from paceline.parallel.exhaustion import is_out_of_memory
from paceline.training.auto_batch import Trial
from paceline.training.understudy import understudy

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.batch import Batch
    from paceline.training.peak import Peak
    from paceline.training.precision import Precision
    from paceline.training.understudy import Cast

WARM_UP_STEPS = 1
"""Libraries choose their ways, and the optimiser makes its state, in the first step."""
_TIMED_S, _TIMED_STEPS = 0.5, 5


class Rehearsal:
    """Steps and answers of an understudy, on the network's device."""

    def __init__(self, cast: Cast, precision: Precision) -> None:
        self.eager = understudy(cast, precision)
        self._amp_dtype = precision.amp_dtype
        self._device = next(cast.network.parameters()).device

    def step(self, batch: Batch) -> None:
        """Train on a batch of the device: forward, loss, backward, update, average."""
        self.eager.ema.advance()
        self.eager.run(batch, completes=True)

    def evaluation(self, batch: Batch) -> Callable[[], None]:
        """Return what answers a batch by the average with its norms folded in, again and again."""
        folded = fuse(self.eager.ema.network, for_autocast=self._amp_dtype)

        def answer() -> None:
            with (
                torch.inference_mode(),
                torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None),
            ):
                folded(batch.network_input())

        return answer

    def seconds_per_step(self, batch: Batch) -> float:
        """Time steps after those that warm up; the least, since other work can only make one slower."""
        for _ in range(WARM_UP_STEPS):
            self.step(batch)
        times: list[float] = []
        while len(times) < _TIMED_STEPS and sum(times) < _TIMED_S:
            self._settle()
            start = time.perf_counter()
            self.step(batch)
            self._settle()
            times.append(time.perf_counter() - start)
        return min(times)

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


@dataclass(frozen=True, kw_only=True)
class RehearsalMeter:
    """Measures memory and time of whole steps, each number of images with copies of its own."""

    cast: Cast
    precision: Precision
    peak: Peak
    training: Callable[[int], Batch]
    """Makes the batch of a number of images that needs the most memory."""
    evaluation: Callable[[int], Batch]
    """Makes a batch of evaluation."""
    beside: bool = False
    """Whether evaluation runs while training goes on, so that both need memory at once."""
    further_bytes: int = 0
    """What an image takes besides, such as in the loaders' buffers."""

    def __call__(self, images: int) -> Trial | None:
        """Take steps of so many images, and evaluate as many; None where memory ran out."""
        device = next(self.cast.network.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                return self._tried(images, device)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
        self.peak.held_bytes()  # gives back what the failed try has left
        return None

    def _tried(self, images: int, device: torch.device) -> Trial:
        held_bytes = self.peak.held_bytes()
        rehearsal = Rehearsal(self.cast, self.precision)
        batch = self.training(images).to(device)
        seconds: list[float] = []
        peak_bytes = self.peak.of(lambda: seconds.append(rehearsal.seconds_per_step(batch)))
        batch = self.evaluation(images).to(device)
        evaluation_bytes = self.peak.of(rehearsal.evaluation(batch))
        if self.beside:
            peak_bytes += max(evaluation_bytes - held_bytes, 0)
        most_bytes = max(peak_bytes, evaluation_bytes) + images * self.further_bytes
        return Trial(images=images, peak_bytes=most_bytes, seconds=seconds[0])
