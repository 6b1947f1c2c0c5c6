"""The partition: where a network is cut into stages. Measured, solved, joined.

measure    each node alone, in training: seconds forward and backward, bytes that it keeps for the backward pass, and
           the bytes of what is live behind it
solve      the cuts whose slowest stage is as fast as possible, among those that fit into memory
join       one rank measures, all take its cuts
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError
from paceline.models.graph import IMAGES, leaves_join
from paceline.parallel.norms import BatchStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.graph import DetectionModel

BYTES_PER_S = 2e9
"""How fast boundary tensors are taken to travel where nothing is known of the network between the ranks."""


@dataclass(frozen=True, kw_only=True)
class NodeCost:
    """What one node costs for one micro-batch."""

    seconds: float
    """Forward and backward."""
    kept_bytes: int
    """What it keeps from the forward pass for the backward pass."""
    state_bytes: int
    """Its parameters, four times: with their gradients, optimiser state and average."""
    crossing_bytes: int
    """What a cut after this node has to carry forward; as much comes back."""


def measure(
    network: DetectionModel,
    *,
    images: int,
    size_hw: tuple[int, int],
    amp_dtype: torch.dtype | None,
    rounds: int = 3,
) -> tuple[NodeCost, ...]:
    """Measure every node of a network on its device with one micro-batch of `images`, as a step of training takes it.

    So norms take the statistics of the batch, kernels take their part, joins are left to the node after them, frozen
    nodes are evaluated and nobody asks for the gradient of images. All of it is done by a copy: the network, its
    statistics and the random numbers to come stay as they are. Times are the median of `rounds`, taken after a first
    round that does not count.
    """
    twin = _in_training(network)
    first = next(network.parameters())
    device, dtype = first.device, amp_dtype or first.dtype
    random = torch.Generator(device).manual_seed(0)
    pictures = torch.rand(images, 3, *size_hw, device=device, generator=random)
    values: dict[int, tuple[Tensor, ...]] = {IMAGES: (pictures.to(dtype, memory_format=torch.channels_last),)}
    costs = []
    nodes = twin.nodes
    for number, node in enumerate(nodes):
        taken = [tensor for value in node.inputs for tensor in values[value]]
        if leaves_join(twin.model, twin.wiring, number, len(nodes)):
            begun = time.perf_counter()
            values[number] = tuple(taken)
            seconds, kept_bytes = [time.perf_counter() - begun], 0
        else:
            found = [_run_node(node.module, taken, device, amp_dtype) for _ in range(rounds + 1)]
            seconds = [run_s for run_s, _, _ in found[1:]]
            _, kept_bytes, values[number] = found[-1]
        live = twin.live_after(number) if number + 1 < len(nodes) else ()
        costs.append(
            NodeCost(
                seconds=median(seconds),
                kept_bytes=kept_bytes,
                state_bytes=4 * sum(p.numel() * p.element_size() for p in node.module.parameters()),
                crossing_bytes=sum(t.numel() * t.element_size() for value in live for t in values[value]),
            )
        )
        for value in twin.wiring.freed[number]:
            del values[value]
    return tuple(costs)


def _in_training(network: DetectionModel) -> DetectionModel:
    """Copy a network as a step has it: its norms, and all nodes in training that have something to learn."""
    twin = copy.deepcopy(network)
    BatchStatistics(twin)
    for node in twin.nodes:
        parameters = list(node.module.parameters())
        node.module.train(not parameters or any(parameter.requires_grad for parameter in parameters))
        for parameter in parameters:
            parameter.grad = None
    return twin


def _run_node(
    module: torch.nn.Module, given: list[Tensor], device: torch.device, amp_dtype: torch.dtype | None
) -> tuple[float, int, tuple[Tensor, ...]]:
    """Run a node forward and, where there is something to learn, backward; returns seconds, bytes kept and outputs.

    given, outputs: detached; they require gradients where those of a step do.
    """
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = [_detached(tensor) for tensor in given]
    _wait_for(device)
    start = time.perf_counter()
    with (
        torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        found = module(*inputs)
    outputs = (found,) if isinstance(found, torch.Tensor) else tuple(found)
    _wait_for(device)
    seconds = time.perf_counter() - start
    learning = [tensor for tensor in outputs if tensor.requires_grad]
    gradients = [torch.ones_like(tensor) for tensor in learning]
    _wait_for(device)
    start = time.perf_counter()
    if learning:
        torch.autograd.backward(learning, gradients)
    _wait_for(device)
    seconds += time.perf_counter() - start
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
        parameter.grad = None
    return seconds, sum(kept.values()), tuple(map(_detached, outputs))


def _detached(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.requires_grad)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stage_seconds(costs: Sequence[NodeCost], first: int, stop: int, *, bytes_per_s: float = BYTES_PER_S) -> float:
    """Seconds that a stage of nodes `first` to `stop` - 1 needs for one micro-batch: its nodes and its boundaries."""
    crossing = (costs[first - 1].crossing_bytes if first else 0) + costs[stop - 1].crossing_bytes
    return sum(cost.seconds for cost in costs[first:stop]) + crossing / bytes_per_s


def stage_bytes(costs: Sequence[NodeCost], first: int, stop: int, *, waiting: int) -> int:
    """Bytes that a stage holds while `waiting` micro-batches wait for their backward pass."""
    boundary = (costs[first - 1].crossing_bytes if first else 0) + costs[stop - 1].crossing_bytes
    kept = sum(cost.kept_bytes for cost in costs[first:stop]) + boundary
    return sum(cost.state_bytes for cost in costs[first:stop]) + waiting * kept


def solve(
    costs: Sequence[NodeCost],
    stages: int,
    *,
    bytes_per_s: float = BYTES_PER_S,
    memory_bytes: int | None = None,
    microbatches: int | None = None,
) -> tuple[int, ...]:
    """Return the cuts (node that each stage after the first begins with) whose slowest stage is fastest.

    memory_bytes: what a device has for a stage; None for any number.
    microbatches: those that wait at most: all under GPipe; None where stage s of S has S - s waiting, as under 1F1B.
    Dynamic programming over (stages, nodes): the best of the first `stop` nodes in k stages follows from the best of
    fewer nodes in k - 1. Raises UserError where no cut fits into memory.
    """
    nodes = len(costs)
    assert 1 <= stages <= nodes
    infinity = float("inf")

    def cost(stage: int, first: int, stop: int) -> float:
        waiting = microbatches or stages - stage
        if memory_bytes is not None and stage_bytes(costs, first, stop, waiting=waiting) > memory_bytes:
            return infinity
        return stage_seconds(costs, first, stop, bytes_per_s=bytes_per_s)

    best = [cost(0, 0, stop) if stop else infinity for stop in range(nodes + 1)]
    starts: list[list[int]] = []
    for stage in range(1, stages):
        slowest, start = [infinity] * (nodes + 1), [0] * (nodes + 1)
        for stop in range(stage + 1, nodes + 1):
            for first in range(stage, stop):
                seconds = max(best[first], cost(stage, first, stop))
                if seconds < slowest[stop]:
                    slowest[stop], start[stop] = seconds, first
        best = slowest
        starts.append(start)
    if best[nodes] == infinity:
        raise UserError(
            f"No cut into {stages} stages fits into {(memory_bytes or 0) / 2**30:.1f} GiB per device; take more "
            "stages, more microbatches, a smaller batch or smaller images."
        )
    cuts: list[int] = []
    stop = nodes
    for start in reversed(starts):
        stop = start[stop]
        cuts.append(stop)
    return tuple(reversed(cuts))
