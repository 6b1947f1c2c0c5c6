"""Everything that differs between the versions of torch that Paceline works with (2.11 and 2.13)."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


def distributed_data_parallel(module: nn.Module, group: ProcessGroup, **options: Any) -> DistributedDataParallel:
    """Wrap a module without any broadcast of its buffers: 2.13 renamed the option and warns of the old name."""
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options[name] = False
    return DistributedDataParallel(module, process_group=group, **options)


def shard_fully(module: nn.Module, mesh: DeviceMesh) -> None:
    """Apply FSDP2 to a module in place; its gradients are sums over the ranks, not means."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    fully_shard(module, mesh=mesh)
    assert isinstance(module, FSDPModule)
    if hasattr(module, "set_gradient_divide_factor"):
        module.set_gradient_divide_factor(1.0)
    else:
        module.set_reduce_scatter_divide_factor(1.0)
