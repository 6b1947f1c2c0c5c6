"""The engine: how forward, loss, backward and the exchange of gradients are carried out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from paceline.batch import Batch
    from paceline.losses.detection import LossSums
    from paceline.parallel.parts import Parts


class Criterion(Protocol):
    """What turns the network's outputs into sums of losses; knows nothing of devices."""

    def __call__(self, predictions: tuple[Tensor, ...], batch: Batch) -> LossSums:
        """Return loss sums that are not divided by their normaliser."""


class Engine(Protocol):
    """Adds up gradients of sums over batches, then makes them the gradient of one big batch.

    ```
    accumulate(batch) -> g += gradient of the loss sums, N += normaliser      once per batch
    gradient()        -> g x images / max(N, 1), clipped                      once per update
    ```
    (docs/decisions/0002). The losses never call a collective; an engine over several devices sums g, N and the
    number of images over them. Whatever it returns is global: the same on every rank.
    """

    parts: Parts
    """What of the network lies on this rank."""
    is_capturable: bool
    """Whether batches of one shape are the same work for the device each time, and none for the host: only then can
    it be captured in a graph."""

    @property
    def network(self) -> nn.Module:
        """What this rank has of the network, whose parameters receive the gradients."""

    def accumulate(self, batch: Batch, *, completes: bool = True, share: float = 1.0) -> LossSums:
        """Run this rank's batch forward and backward; returns the detached sums of all ranks, on the device.

        completes: whether `gradient` comes next; gradients need not travel before.
        share: what this is of a batch that comes in parts, which running statistics count as one.
        """

    def gradient(self) -> Tensor:
        """Finish the gradients in place; returns a 0-dim float tensor: 1.0 if they are not finite, else 0.0.

        The running statistics of batch norms take in the batches since the last update.
        """

    def state(self) -> list[Tensor]:
        """Return every tensor that these two change in place, beside the network's own and the gradients.

        None of them ever moves in memory; copying them is all it takes to go back to an earlier moment.
        """

    def unwatched(self) -> AbstractContextManager[None]:
        """Surround steps that are none of the run, as while a graph is recorded, or go past this engine: its replay."""

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing.

        Collective; `parts.whole` of it is the same for every layout.
        """

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the whole of what `pending` gave, under whatever layout."""
