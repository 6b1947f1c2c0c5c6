"""Gathering: what ranks tell each other between steps. Inside a step, engines talk by themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from paceline.evaluation.table import DetectionTable

T = TypeVar("T")
RankGroup: TypeAlias = "ProcessGroup"
"""Ranks that talk to each other, for rooms that only hand it on."""


def from_first(value: T) -> T:
    """Return on every rank what rank 0 has; any value that can be pickled."""
    if not dist.is_available() or not dist.is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0, device=_device_of_objects())
    return cast("T", box[0])


def of_all(value: T) -> list[T]:
    """Return what each rank has, in their order, on every rank; any value that can be pickled."""
    if not dist.is_available() or not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def largest(value: int) -> int:
    """Return the largest of a number over all ranks, on each of them; waits until all have come here."""
    return max(of_all(value))


def group_apart() -> ProcessGroup | None:
    """Make a group of all ranks for a second thread, whose collectives never get between those of the first.

    It knows the hosts' network alone, so nothing of it stands in the devices' queues. Every rank has to come here, at
    the same place. None where there is one process.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    return cast("ProcessGroup", dist.new_group(backend="gloo"))


def gather_detections(table: DetectionTable | None, group: ProcessGroup | None = None) -> DetectionTable | None:
    """Join the detections of all ranks on rank 0, which saw different images; None on the others.

    table: None from a rank that has not seen all of its images: there is then no answer on rank 0 either.
    group: of all ranks; the world where it is None.
    """
    if not dist.is_available() or not dist.is_initialized():
        return table
    tables: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(table, tables, dst=0, group=group)
    return None if tables is None or table is None or None in tables else type(table).concatenate(tables)


def union(tensors: Mapping[str, Tensor], group: ProcessGroup) -> dict[str, Tensor]:
    """Join the tensors of all ranks of a group on each of them, on the host; of equal keys, the last rank's counts."""
    host = device_of(group)
    described = {key: (tuple(value.shape), value.dtype) for key, value in tensors.items()}
    descriptions: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(descriptions, described, group=group)
    mine = [value.detach().to(host).contiguous().flatten().view(torch.uint8) for value in tensors.values()]
    joined: dict[str, Tensor] = {}
    for rank, description in enumerate(descriptions):
        sizes = [_bytes(shape, dtype) for shape, dtype in description.values()]
        if sum(sizes) == 0:
            continue
        is_mine = rank == dist.get_rank(group)
        flat = torch.cat(mine) if is_mine else torch.empty(sum(sizes), dtype=torch.uint8, device=host)
        dist.broadcast(flat, group=group, group_src=rank)
        for (key, (shape, dtype)), part in zip(description.items(), torch.split(flat.to("cpu"), sizes), strict=True):
            joined[key] = part.clone().view(dtype).view(shape)
    return joined


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def device_of(group: ProcessGroup) -> torch.device:
    """Say where tensors have to lie to be sent: on the host, unless the group only knows the device's network."""
    backends = dist.get_backend_config(group)
    return torch.device("cpu") if "gloo" in backends or "mpi" in backends else torch.device("cuda")


def wire_of(device: torch.device, group: ProcessGroup) -> torch.device | None:
    """Say where tensors of a device have to be copied to be sent from rank to rank; None if they go as they are.

    gloo's collectives take tensors of a GPU, its sends and receives do not.
    """
    backends = dict(entry.split(":") for entry in dist.get_backend_config(group).split(","))
    return torch.device("cpu") if device.type != "cpu" and backends.get(device.type) == "gloo" else None


def _device_of_objects() -> torch.device:
    assert dist.group.WORLD is not None
    return device_of(dist.group.WORLD)
