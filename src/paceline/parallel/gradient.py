"""The gradient of an update: sums from many batches, divided once, clipped, and checked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from paceline.lists import Walk, Walks, multiply, settle, squares
from paceline.parallel.shards import laid_out_like, local
from paceline.prefix import with_prefix, without_prefix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from paceline.losses.detection import LossSums
    from paceline.parallel.loss_scale import LossScale


class GradientSum:
    """What was added up since the last update, over all ranks: images, normaliser, and the parameters' gradients.

    The gradients themselves lie where autograd puts them; this knows what they have to be multiplied by.
    """

    def __init__(
        self, parameters: Mapping[str, torch.nn.Parameter], device: torch.device, *, clip: float, loss_scale: LossScale
    ) -> None:
        """Start with nothing.

        parameters: those of this rank that are trained, by the network's keys.
        clip: largest norm of the gradient of the big batch; 0 leaves it as it is.
        """
        self.parameters = dict(parameters)
        self.loss_scale = loss_scale
        self._clip = clip
        self._walks = Walks()
        dtype = torch.promote_types(next(iter(self.parameters.values())).dtype, torch.float32)
        self._images, self._normaliser = torch.zeros(2, device=device, dtype=dtype).unbind()

    def state(self) -> list[Tensor]:
        """Return every tensor that changes in place beside the gradients."""
        return [self._images, self._normaliser, *self.loss_scale.state()]

    def add(self, sums: LossSums, images: int | Tensor) -> None:
        """Count a batch of all ranks: its detached sums, and how many images it had."""
        self._images += images
        self._normaliser += sums.normaliser

    def gradients(self) -> list[Tensor]:
        """Return this rank's gradients, of sharded parameters its shards, to be changed in place."""
        return [local(value.grad) for value in self.parameters.values() if value.grad is not None]

    def drop(self) -> None:
        """Forget what was added since the last update, gradients that a failed backward pass has left among it."""
        for parameter in self.parameters.values():
            parameter.grad = None
        self._images.zero_()
        self._normaliser.zero_()

    @torch.no_grad()
    def finish(self, *, share: float = 1.0, add_up: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Divide the gradients once, clip them, and say whether they are finite (0.0) or not (1.0).

        share: what the gradients are of the sum over all ranks (1/ranks where they were averaged).
        add_up: sums a 0-dim tensor over the ranks that hold other parameters than this one.
        """
        gradients = self.gradients()
        walk = self._walks.over(moving=gradients)
        not_finite = (
            self._finished_by_torch(gradients, share, add_up)
            if walk is None
            else self._finished_by_kernels(walk, share, add_up)
        )
        self.loss_scale.update(not_finite)
        return not_finite

    def _finished_by_kernels(self, walk: Walk, share: float, add_up: Callable[[Tensor], Tensor] | None) -> Tensor:
        parts = squares(walk)
        if add_up is not None:
            parts = add_up(parts.sum()).reshape(1)
        counts = (self._images, self._normaliser)
        factor, not_finite = settle(parts, *counts, self.loss_scale.value, share=share, clip=self._clip)
        multiply(walk, factor)
        return not_finite

    def _finished_by_torch(
        self, gradients: list[Tensor], share: float, add_up: Callable[[Tensor], Tensor] | None
    ) -> Tensor:
        factor = self._images / (self._normaliser.clamp(min=1.0) * self.loss_scale.value * share)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if add_up is not None:
            norm = add_up(norm.square()).sqrt()
        norm = norm * factor
        if self._clip > 0:
            factor = factor * (self._clip / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, factor)
        self._images.zero_()
        self._normaliser.zero_()
        return (~torch.isfinite(norm)).to(norm.dtype)

    def pending(self) -> dict[str, Tensor]:
        """Return what was added up since the last update; of the gradients, this rank's."""
        scale = self.loss_scale.saved()
        if int(self._images) == 0:
            return scale
        gradients = {name: value.grad for name, value in self.parameters.items() if value.grad is not None}
        sums = {"normaliser": self._normaliser.clone(), "images": self._images.long()}
        return with_prefix("gradient", gradients) | scale | sums | {"loss_scale": self.loss_scale.value.clone()}

    @torch.no_grad()
    def load_pending(self, tensors: Mapping[str, Tensor], *, share: float = 1.0) -> None:
        """Put back the whole of what `pending` gave, the gradients times `share`.

        They carry the scale that the loss had, which may be another one now: precision is chosen anew.
        """
        saved_scale = float(tensors.get("loss_scale", 1.0))
        self.loss_scale.load(tensors)
        share *= float(self.loss_scale.value) / saved_scale
        if "images" not in tensors:
            return
        self._images.copy_(tensors["images"])
        self._normaliser.copy_(tensors["normaliser"])
        gradients = without_prefix("gradient", tensors)
        for name, parameter in self.parameters.items():
            if name in gradients:
                parameter.grad = laid_out_like(parameter.detach(), gradients[name] * share)
