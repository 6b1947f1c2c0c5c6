"""Shards: the part of a tensor that lies on this rank, and how a whole tensor becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.nn import Module


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory with the tensor; a tensor that is not sharded is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out_like(like: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor as `like` is: this rank's shard, or in its memory format; another shape as it is."""
    if value.shape != like.shape:
        return value
    if isinstance(like, DTensor):
        whole = value.to(device=like.device, dtype=like.dtype)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(value)


def sharded_like(like: Tensor, value: Tensor) -> Tensor:
    """Return this rank's tensor as its shard of a whole one, where `like` is sharded and its shard has that shape."""
    if not isinstance(like, DTensor) or value.shape != like.to_local().shape:
        return value
    return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def load_whole_state(network: Module, tensors: Mapping[str, Tensor]) -> None:
    """Load this rank's part of a whole state: of the keys that the network has, its shards."""
    network.load_state_dict({key: laid_out_like(value, tensors[key]) for key, value in network.state_dict().items()})
