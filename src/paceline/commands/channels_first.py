"""Channels first: batches for a network that was chosen to lie in memory with its channels outermost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.batch import Batch
    from paceline.training.loop import TrainingData


class ChannelsFirst:
    """Gives the batches of a source, images laid out anew: convolutions keep the layout of what they are given."""

    def __init__(self, source: TrainingData) -> None:
        """Take batches from a source."""
        self._source = source

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks."""
        return self._source.batch_size

    def steps(self, epoch: int) -> int:
        """Count the batches of this epoch."""
        return self._source.steps(epoch)

    def epoch(self, epoch: int, *, mosaic: bool) -> Iterator[Batch]:
        """Yield the batches of this epoch, in order."""
        for batch in self._source.epoch(epoch, mosaic=mosaic):
            yield batch.channels_first()

    def stats(self) -> dict[str, float]:
        """Seconds and counts since the start."""
        return self._source.stats()
