"""The engine for one device in one process."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from paceline.models.operations.half_weights import halved
from paceline.parallel.gradient import GradientSum
from paceline.parallel.loss_scale import LossScale
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.parts import WholeParts
from paceline.prefix import with_prefix, without_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn

    from paceline.batch import Batch
    from paceline.ledger import Ledger
    from paceline.losses.detection import LossSums
    from paceline.parallel.engine import Criterion
    from paceline.parallel.parts import Parts


class SingleEngine:
    """Runs batches on the device that holds the network, with gradients summed as decision 0002 says."""

    is_capturable = True

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        *,
        amp_dtype: torch.dtype | None,
        clip: float,
        ledger: Ledger,
        loss_scale: float = 1.0,
    ) -> None:
        """Prepare for training.

        amp_dtype: type of autocast, None for full precision.
        clip: largest norm of the gradient of the big batch; 0 leaves it as it is.
        loss_scale: factor on the sums before backward, taken out again in `gradient`; under float16 it adapts, and
            starts low, since sums are larger than means.
        """
        self.network = network
        self.parts: Parts = WholeParts(network)
        self._criterion = criterion
        self._amp_dtype = amp_dtype
        self._ledger = ledger
        named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        first = next(iter(named.values()))
        self._device, self._dtype = first.device, first.dtype
        self.loss_scale = LossScale(loss_scale, self._device, adaptive=amp_dtype is torch.float16)
        self._sum = GradientSum(named, self._device, clip=clip, loss_scale=self.loss_scale)
        self._statistics = BatchStatistics(network)

    def accumulate(self, batch: Batch, *, completes: bool = True, share: float = 1.0) -> LossSums:
        """Run one batch, or this share of one, forward and backward; returns its detached sums, on the device."""
        with self._ledger.span("forward", on_device=True), self._statistics.part(share):
            images = batch.network_input(self._amp_dtype or self._dtype)
            autocast = torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None)
            at_once = halved(self.network) if images.is_cuda else nullcontext()  # elsewhere nothing comes beside
            with autocast, at_once:
                predictions = self.network(images)
        with self._ledger.span("loss", on_device=True):
            sums = self._criterion(predictions, batch)
        with self._ledger.span("backward", on_device=True):
            (sums.total * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]
        detached = sums.detach()
        self._sum.add(detached, len(batch))
        return detached

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device

    def drop(self) -> None:
        """Forget what was accumulated since the last update, a batch that failed in the middle included."""
        self._sum.drop()
        self._statistics.drop()

    def gradient(self) -> Tensor:
        """Divide the summed gradients once, clip them, and say whether they are finite (0.0) or not (1.0)."""
        self._statistics.commit()
        return self._sum.finish()

    def state(self) -> list[Tensor]:
        """Return every tensor that these two change in place, beside the network's own and the gradients."""
        return self._sum.state() + self._statistics.state()

    def unwatched(self) -> AbstractContextManager[None]:
        """Do nothing: what goes wrong in a step is nothing to this engine."""
        return nullcontext()

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing."""
        return self._sum.pending() | with_prefix("statistics", self._statistics.pending())

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `pending` gave."""
        self._sum.load_pending(tensors)
        self._statistics.load_pending(without_prefix("statistics", tensors))
