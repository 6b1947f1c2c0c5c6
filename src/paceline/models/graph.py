"""The graph: a network as a list of nodes, which can be cut after any of them.

A value is known by the index of the node that made it; the images are value -1. Between two nodes some values are
live: made before the cut and needed after it. They are all that the rest of the network has to be given:

    node      0   1   2   3   4   5   6   7   8   9  10  ...
                          |             |
    cut            after 4: {4}    after 6: {4, 6}        (long skips of the neck are live over many cuts)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from paceline.models.blocks import Concat, SplitChain
from paceline.models.operations.beside import note_made
from paceline.models.operations.half_weights import halved
from paceline.models.operations.shared import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

IMAGES = -1
"""Index of the network's input among the values."""


@dataclass(frozen=True)
class Node:
    """A module and the indices of the values that it takes, in order; each below the node's own index."""

    module: nn.Module
    inputs: tuple[int, ...]


class Wiring:
    """Which values each node takes: the graph without its modules, never changed once made."""

    def __init__(self, inputs: Sequence[tuple[int, ...]]) -> None:
        for node, taken in enumerate(inputs):
            assert taken, f"node {node} takes nothing"
            assert all(IMAGES <= value < node for value in taken), f"node {node} takes values made after it"
        self.inputs = tuple(inputs)
        self.last_use = dict.fromkeys(range(IMAGES, len(inputs)), len(inputs))
        """The node that takes each value last; a value that none takes leaves the graph, after its last node."""
        self.last_use.update({value: node for node, taken in enumerate(inputs) for value in taken})
        self.freed = tuple(
            tuple(value for value in dict.fromkeys(taken) if self.last_use[value] == node)
            for node, taken in enumerate(inputs)
        )
        """For each node, the values that nobody needs once it has run."""

    def __len__(self) -> int:
        return len(self.inputs)

    def live_after(self, node: int) -> tuple[int, ...]:
        """Values, in order, that a cut after `node` has to carry; -1 cuts before the first node."""
        assert IMAGES <= node < len(self)
        return tuple(value for value in range(IMAGES, node + 1) if self.last_use[value] > node)


class Segment(nn.Module):
    """Nodes `first` to `stop` - 1 of a network, under the keys that they have in the whole.

    It takes the values that are live before `first` and gives those that are live after `stop` - 1, in order;
    the last segment gives the network's outputs. So segments in a row are the network.
    """

    def __init__(self, nodes: Sequence[Node], *, first: int, stop: int) -> None:
        super().__init__()
        assert 0 <= first < stop <= len(nodes)
        self.wiring = Wiring([node.inputs for node in nodes])
        self.first, self.stop = first, stop
        self.model = nn.ModuleDict({str(index): nodes[index].module for index in range(first, stop)})

    @property
    def takes(self) -> tuple[int, ...]:
        """Indices of the values that `forward` takes."""
        return self.wiring.live_after(self.first - 1)

    @property
    def gives(self) -> tuple[int, ...]:
        """Indices of the values that `forward` gives; for the last segment the head's index alone."""
        return self.wiring.live_after(self.stop - 1)

    def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
        """Run the nodes in order, each value being dropped as soon as its last consumer has run."""
        return run_nodes(self.model, self.wiring, self.first, self.stop, live)


class DetectionModel(nn.Module):
    """A detector: the nodes from the images to the head, whose outputs it gives raw, in training and evaluation alike.

    Keys of the state are `model.<node>.<...>`, those of the published checkpoints.
    """

    def __init__(
        self,
        nodes: Sequence[Node],
        *,
        name: str,
        num_classes: int,
        reg_max: int = 16,
        strides: tuple[int, ...] = (8, 16, 32),
    ) -> None:
        super().__init__()
        self.name = name
        self.num_classes = num_classes
        self.reg_max = reg_max
        self.strides = strides
        self.wiring = Wiring([node.inputs for node in nodes])
        self.model = nn.ModuleDict({str(index): node.module for index, node in enumerate(nodes)})

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes, in the order in which they run."""
        return tuple(
            Node(module, inputs) for module, inputs in zip(self.model.values(), self.wiring.inputs, strict=True)
        )

    def live_after(self, node: int) -> tuple[int, ...]:
        """List the indices, in order, of the values that a cut after `node` has to carry."""
        return self.wiring.live_after(node)

    def segment(self, first: int, stop: int) -> Segment:
        """Nodes `first` to `stop` - 1 as a module of their own that shares their parameters."""
        return Segment(self.nodes, first=first, stop=stop)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map RGB images B3HW in [0, 1], H and W multiples of the largest stride, to the head's outputs.

        With one set of branches: raw boxes BA(4R) and class logits BAK, the points of all strides joined.
        """
        assert all(side % self.strides[-1] == 0 for side in images.shape[2:]), "height and width: multiples of a stride"
        return run_nodes(self.model, self.wiring, 0, len(self.wiring), (images,))


def run_nodes(
    modules: nn.ModuleDict, wiring: Wiring, first: int, stop: int, live: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Run nodes `first` to `stop` - 1 on the values live before them; give those live after them, or the outputs."""
    values: dict[int, Any] = dict(zip(wiring.live_after(first - 1), live, strict=True))
    for node in range(first, stop):
        taken = [_taken(values, value, is_last=wiring.last_use[value] == node) for value in wiring.inputs[node]]
        if isinstance(taken[0], tuple):  # a join that was left to this node
            (taken,) = taken
        if leaves_join(modules, wiring, node, stop):
            values[node] = tuple(taken)
        else:
            with halved(modules[str(node)]):
                values[node] = modules[str(node)](*taken)
            if stop == len(wiring) and node in wiring.inputs[-1]:
                note_made(values[node])
        for value in wiring.freed[node]:
            del values[value]
    if stop == len(wiring):
        outputs: tuple[Tensor, ...] = values[stop - 1]  # the head's value is a tuple itself
        return outputs
    return tuple(values[value] for value in wiring.live_after(stop - 1))


def _taken(values: dict[int, Any], value: int, *, is_last: bool) -> Any:
    """Return a value for one node, and keep it for those who take it later."""
    if is_last:
        return values[value]
    taken, values[value] = shared(values[value], 2)
    return taken


def leaves_join(modules: nn.ModuleDict, wiring: Wiring, node: int, stop: int) -> bool:
    """Whether a node, one of those below `stop`, joins maps for the next one alone, which trains without the join."""
    return (
        torch.is_grad_enabled()
        and isinstance(modules[str(node)], Concat)
        and node + 1 < stop
        and wiring.inputs[node + 1] == (node,)
        and wiring.last_use[node] == node + 1
        and isinstance(modules[str(node + 1)], SplitChain)
    )
