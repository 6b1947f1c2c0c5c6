"""Building: from a layout to the engine that carries it out.

Engines of several ranks are imported where they are built: what they need of torch takes over a second to load.
"""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING

import psutil
import torch
import torch.distributed as dist

from paceline.parallel.gather import from_first
from paceline.parallel.mesh import Mesh
from paceline.parallel.micro import MicroBatches
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.partition import measure, solve
from paceline.parallel.single import SingleEngine

if TYPE_CHECKING:
    from paceline.ledger import Ledger
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion, Engine
    from paceline.parallel.feed import Source
    from paceline.parallel.layout import Layout

log = logging.getLogger("paceline")


def num_ranks() -> int:
    """Count the processes that train together: those of the process group, 1 where there is none."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def exchanges_by_device() -> bool:
    """Say whether devices exchange gradients by themselves, as with NCCL; true where there is nothing to exchange."""
    return num_ranks() == 1 or "nccl" in dist.get_backend_config()


class Ranks:
    """A layout on the ranks of this run, and what is built of it. With one rank it talks to nobody."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        """Make the process groups; every rank has to come here."""
        self.layout = layout
        self._device = device
        self._mesh = Mesh.of(layout, device.type) if layout.devices > 1 else None
        self._whole = True
        if self._mesh is not None and dist.get_rank() == 0:
            log.info("Layout: %s.", layout)

    @property
    def replica(self) -> int:
        """Which share of each batch this rank sees."""
        return 0 if self._mesh is None else self._mesh.replica

    @property
    def evaluation_share(self) -> tuple[int, int]:
        """Which share of the images this rank evaluates, and how many shares there are; known with the engine."""
        if self._mesh is None:
            return 0, 1
        return (dist.get_rank(), self.layout.devices) if self._whole else (self._mesh.replica, self.layout.replicas)

    @property
    def evaluates_whole(self) -> bool:
        """Whether each rank evaluates with the whole network, and not as a stage; known with the engine."""
        return self._whole

    def engine(
        self,
        network: DetectionModel,
        criterion: Criterion,
        *,
        batch: int,
        imgsz: int,
        amp_dtype: torch.dtype | None,
        clip: float,
        ledger: Ledger,
        loss_scale: float,
    ) -> Engine:
        """Build the engine around a network, which is changed in place.

        batch: images per step over all ranks. The rest is as for `SingleEngine`.
        """
        layout, mesh = self.layout, self._mesh
        if mesh is None:
            return MicroBatches(
                SingleEngine(network, criterion, amp_dtype=amp_dtype, clip=clip, ledger=ledger, loss_scale=loss_scale)
            )
        if layout.pipeline > 1:
            from paceline.parallel.pipeline import PipelineEngine

            share = batch // layout.replicas
            cuts = self._cuts(network, images=share // layout.microbatches, imgsz=imgsz, amp_dtype=amp_dtype)
            return PipelineEngine(
                network,
                criterion,
                mesh,
                cuts=cuts,
                batch=share,
                size_hw=(imgsz, imgsz),
                amp_dtype=amp_dtype,
                clip=clip,
                ledger=ledger,
                loss_scale=loss_scale,
                evaluates_whole=self._evaluates_whole(network),
            )
        from paceline.parallel.data import DataEngine, Replicas, Shards

        statistics = BatchStatistics(network, group=mesh.norms)
        exchange = (
            Shards(network, mesh.devices["replica"])
            if layout.shard > 1
            else Replicas(network, mesh.replicas, gradients=layout.gradients)
        )
        return DataEngine(
            network,
            criterion,
            exchange,
            statistics,
            amp_dtype=amp_dtype,
            clip=clip,
            ledger=ledger,
            loss_scale=loss_scale,
        )

    def feed(self, source: Source) -> Source:
        """Return what gives each rank its batches, from a source of the batches of its replica."""
        if self._mesh is None or self.layout.pipeline == 1:
            return source
        from paceline.parallel.feed import Feed

        return Feed(source, self._mesh, self._device)

    def _evaluates_whole(self, network: DetectionModel) -> bool:
        """Say whether every rank has room for the whole averaged network beside its stage, twice: it is fused, too."""
        needed_bytes = 2 * sum(value.numel() * value.element_size() for value in network.state_dict().values())
        fits = needed_bytes <= _free_bytes(self._device) / (1 if self._device.type == "cuda" else self.layout.devices)
        answers: list[bool] = [True] * self.layout.devices
        dist.all_gather_object(answers, fits)
        self._whole = all(answers)
        if not self._whole:
            log.info("Evaluation goes through the stages: no device has room for the whole network.")
        return self._whole

    def _cuts(
        self, network: DetectionModel, *, images: int, imgsz: int, amp_dtype: torch.dtype | None
    ) -> tuple[int, ...]:
        """Cut where rank 0 measures that it is best."""
        cuts: tuple[int, ...] = ()
        if dist.get_rank() == 0:
            costs = measure(network, images=images, size_hw=(imgsz, imgsz), amp_dtype=amp_dtype)
            waiting = self.layout.microbatches if self.layout.schedule == "gpipe" else None
            cuts = solve(costs, self.layout.pipeline, memory_bytes=_memory_bytes(self._device), microbatches=waiting)
            edges = (0, *cuts, len(costs))
            shares = [sum(c.seconds for c in costs[a:b]) for a, b in pairwise(edges)]
            text = ", ".join(
                f"nodes {a} to {b - 1} ({share / sum(shares):.0%} of the time)"
                for a, b, share in zip(edges[:-1], edges[1:], shares, strict=True)
            )
            log.info("Stages: %s.", text)
        return from_first(cuts)


def _memory_bytes(device: torch.device) -> int | None:
    """Return what a stage may take of a GPU; a host's memory is shared and not limited here."""
    if device.type != "cuda":
        return None
    return int(0.9 * _free_bytes(device))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return psutil.virtual_memory().available
