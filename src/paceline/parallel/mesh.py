"""The mesh: the process groups of a layout, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from paceline.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Where this rank stands, and with whom it talks."""

    layout: Layout
    devices: DeviceMesh
    """Of two dimensions, `replica` and `stage`."""
    replica: int
    """This rank's share of each batch."""
    stage: int
    """This rank's stage."""
    world: ProcessGroup
    stages: ProcessGroup
    """The stages of this rank's replica, in order."""
    replicas: ProcessGroup
    """The ranks that hold the same stage, in order."""
    norms: ProcessGroup | None
    """The ranks whose batch norms normalise together; None for this one alone."""

    @classmethod
    def of(cls, layout: Layout, device_type: str) -> Mesh:
        """Make the groups of a layout. Every rank of the world has to call it, at the same place."""
        world = dist.group.WORLD
        assert world is not None
        assert dist.get_world_size() == layout.devices, (dist.get_world_size(), layout)
        devices = init_device_mesh(device_type, (layout.replicas, layout.pipeline), mesh_dim_names=("replica", "stage"))
        rank = dist.get_rank()
        return cls(
            layout=layout,
            devices=devices,
            replica=layout.replica_of(rank),
            stage=layout.stage_of(rank),
            world=world,
            stages=devices.get_group("stage"),
            replicas=devices.get_group("replica"),
            norms=_norm_group(layout),
        )


def _norm_group(layout: Layout) -> ProcessGroup | None:
    """Make all groups, since every rank has to take part, and return this rank's."""
    if layout.norm_ranks == 1:
        return None
    found: ProcessGroup | None = None
    for stage in range(layout.pipeline):
        for first in range(0, layout.replicas, layout.norm_ranks):
            ranks = [replica * layout.pipeline + stage for replica in range(first, first + layout.norm_ranks)]
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                found = group
    return found
