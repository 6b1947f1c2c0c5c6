"""A stage: some nodes of the network with the boundaries that its tensors cross.

What crosses a boundary is contiguous in memory, no view of anything, and of shapes and a type that both sides know
beforehand. Feature maps cross as BHWC: a channels-last BCHW tensor is that already, so nothing is rearranged.

```
stage 0                          stage 1
nodes | BCHW -> BHWC, copied --> | BHWC -> BCHW | nodes        forward
      | BHWC <-- contiguous ---- | gradient     |              backward
```
Where the group cannot send what lies on the device (gloo with a GPU), both sides copy it through the host's memory.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel, Segment
    from paceline.parallel.norms import BatchStatistics


class Stage(nn.Module):
    """What the pipeline calls: takes images (first stage) or boundary tensors, gives boundary tensors or outputs."""

    def __init__(
        self,
        segment: Segment,
        statistics: BatchStatistics,
        *,
        device: torch.device,
        dtype: torch.dtype,
        amp_dtype: torch.dtype | None,
        wire: torch.device | None = None,
    ) -> None:
        """Take the nodes of a stage, which lie on `device`.

        wire: device from which boundary tensors are sent and on which they arrive; None for that of the nodes.
        """
        super().__init__()
        self.segment = segment
        self._statistics = statistics
        self.share = 1.0
        """What each micro-batch is of a batch."""
        self._device = device
        self._wire = wire
        self._dtype = dtype
        self._amp_dtype = amp_dtype
        self._is_first = segment.first == 0
        self._is_last = segment.stop == len(segment.wiring)

    @property
    def boundary_dtype(self) -> torch.dtype:
        """Type of what crosses boundaries: that in which the network computes."""
        return self._amp_dtype or self._dtype

    def forward(self, *arrived: Tensor) -> tuple[Tensor, ...]:
        """Run the nodes on one micro-batch; each is a part of the optimiser's batch for the batch norms."""
        if self._is_first:
            live = arrived
        else:
            live = tuple(enter(value if self._wire is None else staged(value, self._device)) for value in arrived)
        with (
            self._statistics.part(self.share) if self.training else nullcontext(),
            torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None),
        ):
            values = self.segment(*live)
        if self._is_last:
            return tuple(value.to(self.boundary_dtype) for value in values)
        leaving = (leave(value.to(self.boundary_dtype)) for value in values)
        return tuple(value if self._wire is None else staged(value, self._wire) for value in leaving)


def leave(value: Tensor) -> Tensor:
    """Turn BCHW into what crosses a boundary: BHWC, contiguous, no view."""
    moved = value.permute(0, 2, 3, 1).contiguous()
    return moved.clone() if moved._is_view() else moved


def staged(value: Tensor, device: torch.device) -> Tensor:
    """Copy to a device, also where it lies there already; the gradient comes back by the same way."""
    return value.to(device, copy=True)


def enter(value: Tensor) -> Tensor:
    """Turn what crossed a boundary into BCHW, channels-last."""
    arrived: Tensor = _Arrival.apply(value)  # type: ignore[no-untyped-call]
    return arrived.permute(0, 3, 1, 2)


class _Arrival(torch.autograd.Function):
    """The identity, whose gradient leaves contiguous: autograd gives narrow slices where a value was concatenated."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


@torch.no_grad()
def boundaries(
    skeleton: DetectionModel, cuts: tuple[int, ...], *, images: int, size_hw: tuple[int, int], dtype: torch.dtype
) -> list[tuple[Tensor, ...]]:
    """Shapes that each stage takes and gives, as tensors on the meta device: boundary s is what stage s takes.

    All are of one type. All but the images ask for a gradient, which is how torch knows that gradients come back.

    skeleton: the network on the meta device. cuts: node that each stage after the first begins with.
    images: of one micro-batch.
    """
    values: tuple[Tensor, ...] = (
        torch.empty(images, 3, *size_hw, device="meta", dtype=next(skeleton.parameters()).dtype),
    )
    pictures = torch.empty(images, 3, *size_hw, device="meta", dtype=dtype, memory_format=torch.channels_last)
    found: list[tuple[Tensor, ...]] = [(pictures,)]
    edges = (0, *cuts, len(skeleton.nodes))
    for first, stop in pairwise(edges):
        values = skeleton.segment(first, stop)(*values)
        is_last = stop == edges[-1]
        found.append(
            tuple(
                torch.empty(
                    value.shape if is_last else (value.shape[0], *value.shape[2:], value.shape[1]),
                    device="meta",
                    dtype=dtype,
                    requires_grad=True,
                )
                for value in values
            )
        )
    return found
