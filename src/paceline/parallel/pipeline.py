"""The pipeline engine: the network cut into stages, each batch going through them in micro-batches.

```
GPipe   stage 0   F0 F1 F2 F3 .  .  .  .  B0 B1 B2 B3       all forward passes, then all backward passes
        stage 1   .  F0 F1 F2 F3 .  .  B0 B1 B2 B3 .
1F1B    stage 0   F0 F1 .  B0 F2 .  B1 F3 ...               a backward pass as soon as there is one:
        stage 1   .  F0 B0 F1 B1 F2 B2 F3 B3                fewer activations wait, in the same time
```
`torch.distributed.pipelining` carries it out. Losses are sums (docs/decisions/0002), so micro-batches simply add up;
the normaliser is known on the last stage alone and reaches the others with the losses. With several replicas each
stage's gradients are summed over them once per update, after the schedule has ended, which is right under any schedule.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from paceline.batch import Batch
from paceline.errors import UserError
from paceline.losses.detection import LossSums
from paceline.parallel.compat import pipeline_schedule, pipeline_stage, run_schedule
from paceline.parallel.gather import wire_of
from paceline.parallel.global_sums import GlobalSums
from paceline.parallel.gradient import GradientSum
from paceline.parallel.loss_scale import LossScale
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.parts import StageParts, skeleton_of
from paceline.parallel.stage import Stage, boundaries
from paceline.prefix import with_prefix, without_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from paceline.ledger import Ledger
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion
    from paceline.parallel.mesh import Mesh
    from paceline.parallel.parts import Parts


class PipelineEngine:
    """One stage of one replica; every rank of a replica is given the same batch.

    Of it, the first stage looks at the images, the last one at the ground truth, and all at its shape.
    """

    is_capturable = False  # sends and receives of the schedule are started by the host, one by one

    def __init__(
        self,
        network: DetectionModel,
        criterion: Criterion,
        mesh: Mesh,
        *,
        cuts: tuple[int, ...],
        batch: int,
        size_hw: tuple[int, int],
        amp_dtype: torch.dtype | None,
        clip: float,
        ledger: Ledger,
        loss_scale: float = 1.0,
        evaluates_whole: bool = True,
    ) -> None:
        """Take this rank's stage out of the network, whose other nodes lose their values; as `SingleEngine` else.

        cuts: node that each stage after the first begins with.
        batch, size_hw: of every batch of this replica; buffers are made once. Raises UserError for a stage that has
            nothing to train.
        evaluates_whole: whether a device has room for the whole network in evaluation; see `StageParts`.
        """
        layout = mesh.layout
        edges = (0, *cuts, len(network.nodes))
        assert len(edges) == layout.pipeline + 1
        self.network = network.segment(edges[mesh.stage], edges[mesh.stage + 1])
        self._mesh = mesh
        self._criterion = criterion
        self._ledger = ledger
        self._shape = (batch, *size_hw)
        named = {name: value for name, value in self.network.named_parameters() if value.requires_grad}
        if not named:
            raise UserError(f"freeze leaves stage {mesh.stage} of the pipeline nothing to train; take fewer stages.")
        _same_everywhere(self.network, mesh)
        first = next(iter(named.values()))
        self._device, self._dtype = first.device, first.dtype
        self.loss_scale = LossScale(loss_scale, self._device, adaptive=amp_dtype is torch.float16)
        self._sum = GradientSum(named, self._device, clip=clip, loss_scale=self.loss_scale)
        self._statistics = BatchStatistics(self.network, group=mesh.norms)
        skeleton = skeleton_of(network)
        for number, node in enumerate(network.nodes):
            if not edges[mesh.stage] <= number < edges[mesh.stage + 1]:
                node.module.to("meta")  # other stages' nodes take no memory here
        self.parts: Parts = StageParts(self.network, skeleton, mesh, cuts=cuts, evaluates_whole=evaluates_whole)
        wire = wire_of(self._device, mesh.stages)
        self._stage = stage = Stage(
            self.network, self._statistics, device=self._device, dtype=self._dtype, amp_dtype=amp_dtype, wire=wire
        )
        edge_tensors = boundaries(
            skeleton, cuts, images=batch // layout.microbatches, size_hw=size_hw, dtype=stage.boundary_dtype
        )
        self._schedule = pipeline_schedule(
            layout.schedule,
            pipeline_stage(
                stage,
                index=mesh.stage,
                stages=layout.pipeline,
                device=self._device if wire is None else wire,
                takes=edge_tensors[mesh.stage],
                gives=edge_tensors[mesh.stage + 1],
                group=mesh.stages,
            ),
            microbatches=layout.microbatches,
            loss=self._loss,
        )
        self._of_microbatches: list[LossSums] = []

    def accumulate(self, batch: Batch, *, completes: bool = True, share: float = 1.0) -> LossSums:
        """Send one batch through the stages and back; returns the detached sums of all replicas."""
        self._check(batch)
        self._stage.share = share / self._mesh.layout.microbatches
        mesh, layout = self._mesh, self._mesh.layout
        self._of_microbatches.clear()
        with self._ledger.span("pipeline", on_device=True):
            images = (self._network_input(batch),) if mesh.stage == 0 else ()
            target = targets_of(batch) if mesh.stage == layout.pipeline - 1 else None
            run_schedule(self._schedule, images, target)
        with self._ledger.span("exchange", on_device=True):
            sums, images_here = _added_up(self._of_microbatches, self._device, self._dtype), len(batch)
            if target is None:
                images_here = 0
            of_all, images_of_all = GlobalSums(sums, images_here, mesh.world).wait()
        self._sum.add(of_all, images_of_all)
        return of_all

    def _network_input(self, batch: Batch) -> Tensor:
        return batch.network_input(self._stage.boundary_dtype).contiguous(memory_format=torch.channels_last)

    def gradient(self) -> Tensor:
        """Sum the gradients over the replicas, divide them once, clip them by the norm over all stages."""
        self._statistics.commit()
        with self._ledger.span("exchange", on_device=True):
            self._reduce(self._sum.gradients())
        return self._sum.finish(add_up=self._over_stages)

    def state(self) -> list[Tensor]:
        """Return every tensor that these two change in place, beside the network's own and the gradients."""
        return self._sum.state() + self._statistics.state()

    def unwatched(self) -> AbstractContextManager[None]:
        """Do nothing: what goes wrong in a step is nothing to this engine."""
        return nullcontext()

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing."""
        pending = self._sum.pending()
        gradients = {name: value.clone() for name, value in pending.items() if name.startswith("gradient.")}
        self._reduce(list(gradients.values()))
        return pending | gradients | with_prefix("statistics", self._statistics.pending_of_all(self._mesh.replicas))

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the whole of what `pending` gave."""
        self._sum.load_pending(tensors, share=1.0 / self._mesh.layout.replicas)
        self._statistics.load_pending(without_prefix("statistics", tensors), ranks=self._mesh.layout.replicas)

    def _check(self, batch: Batch) -> None:
        shape = (len(batch), *batch.size_hw)
        if shape != self._shape:
            asked, laid_out = (
                f"{count} images of {width} x {height} px" for count, height, width in (shape, self._shape)
            )
            raise UserError(
                f"A pipeline keeps one batch and one image size: it was laid out for {laid_out}, not {asked}."
            )

    def _loss(self, outputs: tuple[Tensor, ...], target: Tensor) -> Tensor:
        """Loss of one micro-batch, on the last stage."""
        sums = self._criterion(outputs, batch_of(target, self._shape[1:]))
        self._of_microbatches.append(sums.detach())
        return sums.total * self.loss_scale.value

    @torch.no_grad()
    def _reduce(self, gradients: list[Tensor]) -> None:
        """Sum over the replicas of this stage, in place, in one piece."""
        layout = self._mesh.layout
        if layout.replicas == 1 or not gradients:
            return
        flat = torch.cat([value.flatten() for value in gradients])
        flat = flat.to(torch.bfloat16) if layout.gradients == "bf16" else flat
        dist.all_reduce(flat, group=self._mesh.replicas)
        parts = torch.split(flat, [value.numel() for value in gradients])
        torch._foreach_copy_(gradients, [part.view(value.shape) for value, part in zip(gradients, parts, strict=True)])

    def _over_stages(self, squared: Tensor) -> Tensor:
        dist.all_reduce(squared, group=self._mesh.stages)
        return squared


def targets_of(batch: Batch) -> Tensor:
    """Put the ground truth into one tensor BG6 that can be divided along B: xyxy, label, valid."""
    return torch.cat((batch.boxes, batch.labels.unsqueeze(-1), batch.valid.unsqueeze(-1)), dim=-1)


def batch_of(target: Tensor, size_hw: tuple[int, ...]) -> Batch:
    """Turn what `targets_of` gave into a batch again, whose images are of the right shape and take no memory."""
    boxes, label, valid = torch.split(target, [4, 1, 1], dim=-1)
    images = torch.zeros(1, dtype=torch.uint8, device=target.device).expand(len(target), 3, *size_hw)
    unknown = torch.full((len(target),), -1, device=target.device)
    return Batch(
        images=images,
        boxes=boxes,
        labels=label.squeeze(-1).long(),
        valid=valid.squeeze(-1) > 0,
        samples=unknown,
        original_hw=unknown.unsqueeze(-1).expand(-1, 2),
    )


def _added_up(sums: list[LossSums], device: torch.device, dtype: torch.dtype) -> LossSums:
    zero = torch.zeros((), device=device, dtype=torch.promote_types(dtype, torch.float32))
    parts: dict[str, Any] = {
        name: sum((getattr(part, name) for part in sums), start=zero) for name in ("box", "cls", "dfl", "normaliser")
    }
    return LossSums(**parts)


@torch.no_grad()
def _same_everywhere(network: torch.nn.Module, mesh: Mesh) -> None:
    """Take the values of the first replica."""
    if mesh.layout.replicas > 1:
        for value in (*network.parameters(), *network.buffers()):
            plain = value.data.contiguous()
            dist.broadcast(plain, group=mesh.replicas, group_src=0)
            value.data.copy_(plain)
