"""The engine for one device in one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.parallel.loss_scale import LossScale

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from paceline.batch import Batch
    from paceline.ledger import Ledger
    from paceline.losses.detection import LossSums
    from paceline.parallel.engine import Criterion


class SingleEngine:
    """Runs batches on the device that holds the network, with gradients summed as decision 0002 says."""

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
        self._criterion = criterion
        self._amp_dtype = amp_dtype
        self._clip = clip
        self._ledger = ledger
        self._named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        self._parameters = list(self._named.values())
        self._device = self._parameters[0].device
        self._images = 0
        self._normaliser = torch.zeros((), device=self._device)
        self.loss_scale = LossScale(loss_scale, self._device, adaptive=amp_dtype is torch.float16)

    def accumulate(self, batch: Batch) -> LossSums:
        """Run one batch forward and backward; returns its detached sums, on the device."""
        with self._ledger.span("forward", on_device=True):
            images = batch.network_input()
            with torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None):
                predictions = self.network(images)
        with self._ledger.span("loss", on_device=True):
            sums = self._criterion(predictions, batch)
        with self._ledger.span("backward", on_device=True):
            (sums.total * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]
        detached = sums.detach()
        self._images += len(batch)
        self._normaliser = self._normaliser + detached.normaliser
        return detached

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Divide the summed gradients once, clip them, and say whether they are finite (0.0) or not (1.0)."""
        gradients = [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        factor = self._images / (self._normaliser.clamp(min=1.0) * self.loss_scale.value)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients))) * factor
        if self._clip > 0:
            factor = factor * (self._clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        self._images = 0
        self._normaliser = torch.zeros_like(self._normaliser)
        not_finite = (~torch.isfinite(norm)).to(norm.dtype)
        self.loss_scale.update(not_finite)
        return not_finite

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing."""
        scale = {"loss_scale": self.loss_scale.value} if self.loss_scale.adaptive else {}
        if self._images == 0:
            return scale
        gradients = {f"gradient.{name}": value.grad for name, value in self._named.items() if value.grad is not None}
        return gradients | scale | {"normaliser": self._normaliser, "images": torch.tensor(self._images)}

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `pending` gave."""
        if self.loss_scale.adaptive and "loss_scale" in tensors:
            self.loss_scale.value = tensors["loss_scale"].to(self._device)
        if "images" not in tensors:
            return
        self._images = int(tensors["images"])
        self._normaliser = tensors["normaliser"].to(self._device)
        for name, parameter in self._named.items():
            if f"gradient.{name}" in tensors:
                parameter.grad = torch.empty_like(parameter).copy_(tensors[f"gradient.{name}"])
