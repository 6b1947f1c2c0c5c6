"""The feed of a pipeline: the first stage loads, the last is sent the ground truth, all hear the shapes.

```
stage 0    loads a batch | shape to all | ground truth to the last | batch
stage 1                  | shape        |                          | batch without images or ground truth
stage 2                  | shape        | ground truth             | batch without images
```
So images are loaded, decoded and rendered once per replica, and an image that turns out to be broken is replaced on
the first stage alone. The batches have the shape of the real ones; what they lack takes no memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from paceline.parallel.gather import device_of
from paceline.parallel.pipeline import batch_of, targets_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from paceline.batch import Batch
    from paceline.parallel.mesh import Mesh


class Source(Protocol):
    """Where the batches of a replica come from."""

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks."""

    def steps(self, epoch: int) -> int:
        """Count the batches of this epoch."""

    def epoch(self, epoch: int, *, mosaic: bool) -> Iterator[Batch]:
        """Yield the batches of this epoch, in order."""

    def stats(self) -> dict[str, float]:
        """Seconds and counts since the start."""


class Feed:
    """Batches for each stage of a replica, from a source that is asked on the first stage alone."""

    def __init__(self, source: Source, mesh: Mesh, device: torch.device) -> None:
        """Deliver to `device` what does not come from the source."""
        self._source = source
        self._mesh = mesh
        self._device = device
        self._wire = device_of(mesh.stages)

    @property
    def batch_size(self) -> int:
        """Images per step, over all ranks."""
        return self._source.batch_size

    def steps(self, epoch: int) -> int:
        """Count the batches of this epoch."""
        return self._source.steps(epoch)

    def stats(self) -> dict[str, float]:
        """Seconds and counts since the start, on this rank."""
        return self._source.stats()

    def epoch(self, epoch: int, *, mosaic: bool) -> Iterator[Batch]:
        """Yield the batches of this epoch, in order; every stage has to take them all."""
        if self._mesh.stage == 0:
            for batch in self._source.epoch(epoch, mosaic=mosaic):
                self._send(batch)
                yield batch
        else:
            for _ in range(self.steps(epoch)):
                yield self._receive()

    def _send(self, batch: Batch) -> None:
        target = targets_of(batch).to(self._wire)
        shape = torch.tensor([*target.shape[:2], *batch.size_hw], device=self._wire)
        dist.broadcast(shape, group=self._mesh.stages, group_src=0)
        dist.send(target.contiguous(), group=self._mesh.stages, group_dst=self._mesh.layout.pipeline - 1)

    def _receive(self) -> Batch:
        shape = torch.empty(4, dtype=torch.int64, device=self._wire)
        dist.broadcast(shape, group=self._mesh.stages, group_src=0)
        images, boxes, height, width = shape.tolist()
        target = torch.zeros(images, boxes, 6, device=self._wire)
        if self._mesh.stage == self._mesh.layout.pipeline - 1:
            dist.recv(target, group=self._mesh.stages, group_src=0)
        return batch_of(target.to(self._device), (height, width))
