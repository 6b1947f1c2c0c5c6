"""Shards: the part of a tensor that lies on this rank, and how a whole tensor becomes one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor
    from torch.nn import Module


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether only a shard of the tensor lies on this rank.

    Importing what knows such tensors takes most of a second, which a run without any should not wait for.
    """
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard, which shares its memory with the tensor; a tensor that is not sharded is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def laid_out_like(like: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor as `like` is: this rank's shard, or in its memory format; another shape as it is."""
    if value.shape != like.shape:
        return value
    if is_sharded(like):
        from torch.distributed.tensor import distribute_tensor

        whole = value.to(device=like.device, dtype=like.dtype)
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return torch.empty_like(like).copy_(value)


def sharded_like(like: Tensor, value: Tensor) -> Tensor:
    """Return a tensor of this rank as its shard of a whole one, where `like` has a shard of that shape."""
    if not is_sharded(like) or value.shape != like.to_local().shape:
        return value
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(value, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def load_whole_state(network: Module, tensors: Mapping[str, Tensor]) -> None:
    """Load this rank's part of a whole state: of the keys that the network has, its shards."""
    network.load_state_dict({key: laid_out_like(value, tensors[key]) for key, value in network.state_dict().items()})
