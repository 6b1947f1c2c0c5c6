"""The data engine: every rank has the network and a share of each batch; gradients are summed while they come.

```
rank 0   forward | loss | backward ...................... | N, losses | gradient()
                        [bucket 4][bucket 3] ... [bucket 0]     the buckets travel while backward goes on,
rank 1   forward | loss | backward ...................... |     and so do N and the losses
```
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Literal, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from paceline.parallel.compat import distributed_data_parallel
from paceline.parallel.global_sums import GlobalSums
from paceline.parallel.gradient import GradientSum
from paceline.parallel.loss_scale import LossScale
from paceline.parallel.parts import ReplicaParts, ShardParts, skeleton_of
from paceline.parallel.shards import local
from paceline.prefix import with_prefix, without_prefix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor, nn
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from paceline.batch import Batch
    from paceline.ledger import Ledger
    from paceline.losses.detection import LossSums
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion
    from paceline.parallel.norms import BatchStatistics
    from paceline.parallel.parts import Parts

GradientType = Literal["fp32", "bf16"]


class Exchange(Protocol):
    """How gradients of the ranks come together during backward."""

    module: nn.Module
    """What is called in place of the network."""
    share: float
    """What the gradients are, afterwards, of the sum over all ranks."""
    group: ProcessGroup
    parts: Parts
    is_capturable: bool
    """See `Engine`."""

    def scope(self, *, completes: bool) -> AbstractContextManager[None]:
        """Surround forward and backward of one batch."""

    def add_up(self, squared: Tensor) -> Tensor:
        """Sum the squared norm of this rank's gradients over the ranks that hold others."""

    def deliver(self) -> None:
        """Give finished gradients to what the optimiser changes."""

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum gradients that have not travelled yet over the ranks."""


class Replicas:
    """DistributedDataParallel: a copy of the network on each rank, gradients averaged in buckets during backward.

    Averaging twice does no harm, since the mean of equal gradients is themselves; so a batch whose gradients need not
    travel yet may let them travel.
    """

    def __init__(self, network: nn.Module, group: ProcessGroup, *, gradients: GradientType = "fp32") -> None:
        """Wrap the network; rank 0's values are copied to all.

        gradients: type in which they travel; bf16 halves what is sent, and rounds each value to 8 bits.
        """
        self.share = 1.0 / dist.get_world_size(group)
        self.parts: Parts = ReplicaParts(network, group)
        self.group = group
        self.is_capturable = "nccl" in dist.get_backend_config(group)  # others have the host take part
        self._wrapped = distributed_data_parallel(network, group, gradient_as_bucket_view=True, static_graph=True)
        self.module: nn.Module = self._wrapped
        self._is_first = True
        if gradients == "bf16":
            self._wrapped.register_comm_hook(group, lambda state, bucket: _average_in_bfloat16(state, bucket.buffer()))

    def scope(self, *, completes: bool) -> AbstractContextManager[None]:
        """Let the gradients travel with the batch that completes an update, and with the very first one.

        In the very first one, the order in which gradients come is learnt.
        """
        travels = completes or self._is_first
        self._is_first = False
        return nullcontext() if travels else self._wrapped.no_sync()

    def add_up(self, squared: Tensor) -> Tensor:
        """Return the same: all ranks hold the same gradients."""
        return squared

    def deliver(self) -> None:
        """Do nothing: they are where they belong."""

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum copies over the ranks."""
        summed = {key: value.clone() for key, value in tensors.items()}
        for value in summed.values():
            dist.all_reduce(value, group=self.group)
        return summed


class Shards:
    """FSDP2: a share of every parameter, gradient and optimiser state on each rank, gathered node by node when needed.

    Gradients travel with every batch, since those that wait would be whole.
    """

    is_capturable = False  # gradients change hands in `deliver`, and memory is freed and taken again by node

    def __init__(self, network: DetectionModel, mesh: DeviceMesh) -> None:
        """Shard the network over a mesh of one dimension, in place; rank 0's values are taken by all."""
        self.group = mesh.get_group()
        self.share = 1.0 / dist.get_world_size(self.group)  # it averages; sums are not to be had over every backend
        for tensor in (*network.parameters(), *network.buffers()):
            dist.broadcast(tensor.data, group_src=0, group=self.group)
        skeleton = skeleton_of(network)
        twin = skeleton_of(network).to_empty(device=next(network.parameters()).device)
        twin.requires_grad_(requires_grad=False)
        for whole in (network, twin):
            _shard(whole, mesh)
        self.module: nn.Module = network
        parts = ShardParts(network, twin, skeleton, self.group)
        self.parts: Parts = parts
        self._leaves = parts.leaves

    def scope(self, *, completes: bool) -> AbstractContextManager[None]:
        """Do nothing."""
        return nullcontext()

    def add_up(self, squared: Tensor) -> Tensor:
        """Sum over the ranks."""
        dist.all_reduce(squared, group=self.group)
        return squared

    def deliver(self) -> None:
        """Move this rank's shards of the gradients to the leaves."""
        for parameter, leaf in self._leaves.items():
            leaf.grad = None if parameter.grad is None else local(parameter.grad)
            parameter.grad = None

    def collect(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Make sums of the averages that have travelled."""
        return {key: value / self.share for key, value in tensors.items()}


class DataEngine:
    """Runs each rank's share of a batch; the gradient is that of the batches of all ranks together."""

    def __init__(
        self,
        network: nn.Module,
        criterion: Criterion,
        exchange: Exchange,
        statistics: BatchStatistics,
        *,
        amp_dtype: torch.dtype | None,
        clip: float,
        ledger: Ledger,
        loss_scale: float = 1.0,
    ) -> None:
        """Prepare for training; the rest is as for `SingleEngine`.

        statistics, exchange: made of the same network, in this order.
        """
        self.network = network
        self.parts = exchange.parts
        self.is_capturable = exchange.is_capturable
        self._exchange = exchange
        self._criterion = criterion
        self._amp_dtype = amp_dtype
        self._ledger = ledger
        named = {name: value for name, value in network.named_parameters() if value.requires_grad}
        first = next(iter(named.values()))
        self._device, self._dtype = first.device, first.dtype
        self.loss_scale = LossScale(loss_scale, self._device, adaptive=amp_dtype is torch.float16)
        self._sum = GradientSum(named, self._device, clip=clip, loss_scale=self.loss_scale)
        self._statistics = statistics

    def accumulate(self, batch: Batch, *, completes: bool = True, share: float = 1.0) -> LossSums:
        """Run this rank's batch forward and backward; returns the detached sums of all ranks, on the device."""
        with self._exchange.scope(completes=completes):
            with self._ledger.span("forward", on_device=True), self._statistics.part(share):
                images = batch.network_input(self._amp_dtype or self._dtype)
                with torch.autocast(self._device.type, dtype=self._amp_dtype, enabled=self._amp_dtype is not None):
                    predictions = self._exchange.module(images)
            with self._ledger.span("loss", on_device=True):
                sums = self._criterion(predictions, batch)
                travelling = GlobalSums(sums, len(batch), self._exchange.group)
            with self._ledger.span("backward", on_device=True):
                (sums.total * self.loss_scale.value).backward()  # type: ignore[no-untyped-call]
        with self._ledger.span("exchange", on_device=True):
            of_all, images_of_all = travelling.wait()
        self._sum.add(of_all, images_of_all)
        return of_all

    def gradient(self) -> Tensor:
        """Divide the summed gradients once, clip them, and say whether they are finite (0.0) or not (1.0)."""
        self._statistics.commit()
        not_finite = self._sum.finish(share=self._exchange.share, add_up=self._exchange.add_up)
        self._exchange.deliver()
        return not_finite

    def state(self) -> list[Tensor]:
        """Return every tensor that these two change in place, beside the network's own and the gradients."""
        return self._sum.state() + self._statistics.state()

    def unwatched(self) -> AbstractContextManager[None]:
        """Do nothing: what goes wrong in a step is nothing to this engine."""
        return nullcontext()

    def pending(self) -> dict[str, Tensor]:
        """Return what was accumulated since the last update, for a checkpoint; empty if there is nothing."""
        pending = self._sum.pending()
        gradients = {name: value for name, value in pending.items() if name.startswith("gradient.")}
        statistics = self._statistics.pending_of_all(self._exchange.group)
        return pending | self._exchange.collect(gradients) | with_prefix("statistics", statistics)

    def load_pending(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back the whole of what `pending` gave."""
        self._sum.load_pending(tensors, share=self._exchange.share)
        ranks = dist.get_world_size(self._exchange.group)
        self._statistics.load_pending(without_prefix("statistics", tensors), ranks=ranks)


def _average_in_bfloat16(group: ProcessGroup, values: Tensor) -> torch.futures.Future[Tensor]:
    """Average a bucket over the ranks, rounded on the way; torch's own hook does this over NCCL alone."""
    rounded = (values / dist.get_world_size(group)).to(torch.bfloat16)
    work = dist.all_reduce(rounded, group=group, async_op=True)
    assert work is not None

    def put_back(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        return values.copy_(future.value()[0])

    return cast("torch.futures.Future[Tensor]", work.get_future().then(put_back))


def _shard(network: nn.Module, mesh: DeviceMesh) -> None:
    """Shard every node by itself, then what is left; weights are laid out plainly first, as shards have to be."""
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    for module in network.get_submodule("model").children():
        fully_shard(module, mesh=mesh)
    fully_shard(network, mesh=mesh)
