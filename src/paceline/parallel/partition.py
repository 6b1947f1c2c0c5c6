"""The partition: where a network is cut into stages. Measured, solved, joined.

measure    each node alone: seconds forward and backward, bytes that it keeps for the backward pass, and the bytes
           of what is live behind it
solve      the cuts whose slowest stage is as fast as possible, among those that fit into memory
join       one rank measures, all take its cuts
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch

from paceline.errors import UserError

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
    """Measure every node of a network on its device with one micro-batch of `images`; the network stays as it is.

    Times are the median of `rounds`, taken after a first round that does not count.
    """
    first = next(network.parameters())
    device, dtype = first.device, first.dtype
    was_training = [(module, module.training) for module in network.modules()]
    network.eval()  # leaves statistics alone; the difference in time is a few per cent, alike for all nodes
    gradients = [(parameter, parameter.grad) for parameter in network.parameters()]
    try:
        values: dict[int, Tensor | tuple[Tensor, ...]] = {
            -1: torch.rand(images, 3, *size_hw, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        }
        costs = []
        for number, node in enumerate(network.nodes):
            inputs = [_detached(values[value]) for value in node.inputs]
            seconds = []
            for _ in range(rounds + 1):
                taken, kept_bytes, outputs = _run_node(node.module, inputs, device, amp_dtype)
                seconds.append(taken)
            values[number] = outputs
            live = [values[value] for value in network.live_after(number)] if number + 1 < len(network.nodes) else []
            costs.append(
                NodeCost(
                    seconds=median(seconds[1:]),
                    kept_bytes=kept_bytes,
                    state_bytes=4 * sum(p.numel() * p.element_size() for p in node.module.parameters()),
                    crossing_bytes=sum(t.numel() * t.element_size() for t in live if isinstance(t, torch.Tensor)),
                )
            )
    finally:
        for module, training in was_training:
            module.training = training
        for parameter, gradient in gradients:
            parameter.grad = gradient
    return tuple(costs)


def _run_node(
    module: torch.nn.Module, inputs: list[Tensor], device: torch.device, amp_dtype: torch.dtype | None
) -> tuple[float, int, Tensor | tuple[Tensor, ...]]:
    """Run a node forward and backward; returns seconds, bytes kept and its detached outputs."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    _wait_for(device)
    start = time.perf_counter()
    with (
        torch.autocast(device.type, dtype=amp_dtype, enabled=amp_dtype is not None),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        outputs = module(*inputs)
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    torch.autograd.backward(tensors, [torch.ones_like(tensor) for tensor in tensors])
    _wait_for(device)
    seconds = time.perf_counter() - start
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
        parameter.grad = None
    return seconds, sum(kept.values()), outputs.detach() if isinstance(outputs, torch.Tensor) else tuple(tensors)


def _detached(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    assert isinstance(value, torch.Tensor), "only the head gives several values"
    return value.detach().requires_grad_(True)


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
