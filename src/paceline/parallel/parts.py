"""Parts: what of the network lies on this rank, and how the whole is put together from all of them.

A state is a dict of tensors by the network's keys (`model.4.cv1.conv.weight`), whatever the layout; a run that is cut
in another way, or not at all, has the same keys, and so have its checkpoints.

```
            network               state here               whole state
single      all of it             all of it                the same
data        all of it             all of it                the same
fsdp        all of it, sharded    shards (DTensor)         gathered from all ranks
pipeline    the nodes of a stage  theirs                   gathered from all stages
```
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn

from paceline.parallel.forward import ForwardStages
from paceline.parallel.gather import union
from paceline.parallel.shards import is_sharded, local

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor
    from torch.distributed import ProcessGroup

    from paceline.models.graph import DetectionModel, Segment
    from paceline.parallel.mesh import Mesh

M = TypeVar("M", bound=nn.Module)


class Parts(Protocol):
    """How the network lies on the ranks. All of it is collective: every rank calls it at the same place."""

    def twin(self) -> nn.Module:
        """Return a second network of the same layout and values, for the moving average."""

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return what the optimiser has to change for this parameter of the network."""

    def settle(self, *networks: nn.Module) -> None:
        """Average the running statistics of networks over the ranks that saw other images, in place."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Put the whole state together from what all ranks give; the whole is returned on each of them."""

    def assemble(self, network: nn.Module) -> nn.Module:
        """Put the whole network together from the parts on all ranks, for evaluation.

        What it gives for images is None on ranks that are not to answer.
        """


class WholeParts:
    """One process that holds everything."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network

    def twin(self) -> nn.Module:
        """Return a copy."""
        return copy.deepcopy(self._network)

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return the same."""
        return parameter

    def settle(self, *networks: nn.Module) -> None:
        """Do nothing."""

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the same."""
        return dict(tensors)

    def assemble(self, network: nn.Module) -> nn.Module:
        """Return the same."""
        return network


class ReplicaParts(WholeParts):
    """Every rank holds everything, and saw other images."""

    def __init__(self, network: nn.Module, replicas: ProcessGroup) -> None:
        super().__init__(network)
        self._replicas = replicas

    def settle(self, *networks: nn.Module) -> None:
        """Average the running statistics over the replicas."""
        average_buffers(networks, self._replicas)


class ShardParts:
    """Every rank holds a share of every parameter, and saw other images."""

    def __init__(self, network: nn.Module, twin: nn.Module, skeleton: nn.Module, ranks: ProcessGroup) -> None:
        """Take the sharded network and its sharded twin, and a network on the meta device that is not sharded."""
        self._network = network
        self.leaves = {value: nn.Parameter(local(value.detach())) for value in network.parameters()}
        """Fused optimisers do not know sharded tensors; these share the memory of the shards."""
        self._twin = twin
        self._skeleton = skeleton
        self._ranks = ranks

    def twin(self) -> nn.Module:
        """Return the twin, with the network's values."""
        self._twin.load_state_dict(self._network.state_dict())
        return self._twin

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return this rank's shard as a parameter of its own."""
        return self.leaves[cast("nn.Parameter", parameter)]

    def settle(self, *networks: nn.Module) -> None:
        """Average the running statistics over the ranks."""
        average_buffers(networks, self._ranks)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather every shard."""
        return {key: value.full_tensor() if is_sharded(value) else value for key, value in tensors.items()}

    def assemble(self, network: nn.Module) -> nn.Module:
        """Gather every shard into a network that is not sharded."""
        return _filled(self._skeleton, self.whole(network.state_dict()))


class StageParts:
    """Every rank holds the nodes of one stage, and the ranks of one replica saw the same images."""

    def __init__(
        self,
        segment: Segment,
        skeleton: DetectionModel,
        mesh: Mesh,
        *,
        cuts: tuple[int, ...],
        evaluates_whole: bool = True,
    ) -> None:
        """Take the stage's nodes and the whole network on the meta device.

        evaluates_whole: whether `assemble` gives each rank the whole network, or the stages as they are, which answer
            on the last stage alone.
        """
        self._segment = segment
        self._skeleton = skeleton
        self._mesh = mesh
        self._cuts = cuts
        self._evaluates_whole = evaluates_whole

    def twin(self) -> nn.Module:
        """Return a copy of the stage."""
        return copy.deepcopy(self._segment)

    def leaf(self, parameter: Tensor) -> Tensor:
        """Return the same."""
        return parameter

    def settle(self, *networks: nn.Module) -> None:
        """Average the running statistics over the replicas of this stage."""
        average_buffers(networks, self._mesh.replicas)

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Join what the stages give."""
        return union(tensors, self._mesh.stages)

    def assemble(self, network: nn.Module) -> nn.Module:
        """Gather the stages into one network, or let them answer together."""
        if not self._evaluates_whole:
            return ForwardStages(cast("Segment", network), self._skeleton, self._cuts, self._mesh)
        return _filled(self._skeleton, self.whole(network.state_dict()))


@torch.no_grad()
def average_buffers(networks: tuple[nn.Module, ...], group: ProcessGroup) -> None:
    """Average all floating-point buffers over a group, in place, by one exchange."""
    ranks = dist.get_world_size(group)
    buffers = [value for network in networks for value in network.buffers() if value.is_floating_point()]
    if ranks == 1 or not buffers:
        return
    joined = torch.cat([value.flatten() for value in buffers])
    dist.all_reduce(joined, group=group)
    joined /= ranks
    parts = torch.split(joined, [value.numel() for value in buffers])
    for value, part in zip(buffers, parts, strict=True):
        value.copy_(part.view_as(value))


def skeleton_of(network: M) -> M:
    """Copy a network to the meta device, where it has shapes and no values."""
    return copy.deepcopy(network).to("meta").eval()


def _filled(skeleton: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Copy a skeleton and give it values."""
    network = copy.deepcopy(skeleton)
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
