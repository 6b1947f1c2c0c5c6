"""Forward only: the averaged network answering through its stages, where it is too large to be put together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paceline.parallel.gather import device_of
from paceline.parallel.stage import boundaries

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel, Segment
    from paceline.parallel.mesh import Mesh


class ForwardStages(nn.Module):
    """The stages of one replica as one network: images in on the first stage, outputs out on the last.

    Every stage calls it with the same batch, at the same place; those before the last get None. Copies of it, fused
    ones too, talk to each other as the original does.
    """

    def __init__(self, segment: Segment, skeleton: DetectionModel, cuts: tuple[int, ...], mesh: Mesh) -> None:
        """Take this rank's stage, and the whole network on the meta device for the shapes between stages."""
        super().__init__()
        self.segment = segment
        self._wires = _Wires(skeleton, cuts, mesh)

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | None:
        """Map images B3HW in [0, 1] to the head's outputs on the last stage, None on the others."""
        wires = self._wires
        live = (images,) if wires.stage == 0 else wires.receive(images)
        values: tuple[Tensor, ...] = self.segment(*live)
        if wires.is_last:
            return values
        wires.send(values)
        return None


class _Wires:
    """Sends and receives between neighbours; copies of it are itself, since process groups cannot be copied."""

    def __init__(self, skeleton: DetectionModel, cuts: tuple[int, ...], mesh: Mesh) -> None:
        self.stage = mesh.stage
        self.is_last = mesh.stage == mesh.layout.pipeline - 1
        self._skeleton = skeleton
        self._cuts = cuts
        self._group = mesh.stages
        self._wire = device_of(mesh.stages)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Wires:
        return self

    def send(self, values: tuple[Tensor, ...]) -> None:
        """Send boundary values BCHW to the next stage, as BHWC in float32."""
        for value in values:
            moved = value.permute(0, 2, 3, 1).to(self._wire, torch.float32).contiguous()
            dist.send(moved, group=self._group, group_dst=self.stage + 1)

    def receive(self, images: Tensor) -> tuple[Tensor, ...]:
        """Take what the stage before sends for a batch of the shape of `images`."""
        size_hw = (images.shape[2], images.shape[3])
        expected = boundaries(self._skeleton, self._cuts, images=len(images), size_hw=size_hw, dtype=torch.float32)[
            self.stage
        ]
        values = []
        for like in expected:
            value = torch.empty(like.shape, dtype=torch.float32, device=self._wire)
            dist.recv(value, group=self._group, group_src=self.stage - 1)
            values.append(value.to(images.device, images.dtype).permute(0, 3, 1, 2))
        return tuple(values)
