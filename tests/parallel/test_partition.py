"""Laws of the partition: the chosen cut is the best of all cuts."""

from __future__ import annotations

import copy
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import UserError
from paceline.models.blocks import Concat
from paceline.models.registry import build_model
from paceline.native import norm
from paceline.parallel import partition
from paceline.parallel.norms import BatchNorm, BatchStatistics
from paceline.parallel.partition import NodeCost, measure, solve, stage_bytes, stage_seconds
from paceline.training.freeze import freeze_nodes

costs_of_some_nodes = st.lists(
    st.builds(
        NodeCost,
        seconds=st.floats(0.0, 1.0),
        kept_bytes=st.integers(0, 1000),
        state_bytes=st.integers(0, 1000),
        crossing_bytes=st.integers(0, 10**9),
    ),
    min_size=3,
    max_size=9,
)


def brute_force(costs: list[NodeCost], stages: int, memory_bytes: int | None, waiting: int | None) -> float | None:
    """Seconds of the slowest stage of the best of all cuts; None where none fits."""
    best = None
    for cuts in combinations(range(1, len(costs)), stages - 1):
        edges = list(zip((0, *cuts), (*cuts, len(costs)), strict=True))
        sizes = [
            stage_bytes(costs, first, stop, waiting=waiting or stages - stage)
            for stage, (first, stop) in enumerate(edges)
        ]
        if memory_bytes is None or max(sizes) <= memory_bytes:
            slowest = max(stage_seconds(costs, first, stop) for first, stop in edges)
            best = slowest if best is None else min(best, slowest)
    return best


def slowest_stage(costs: list[NodeCost], cuts: tuple[int, ...]) -> float:
    edges = zip((0, *cuts), (*cuts, len(costs)), strict=True)
    return max(stage_seconds(costs, first, stop) for first, stop in edges)


@given(costs_of_some_nodes, st.integers(1, 3), st.one_of(st.none(), st.integers(500, 9000)), st.sampled_from([None, 4]))
def test_no_cut_is_better(costs: list[NodeCost], stages: int, memory_bytes: int | None, waiting: int | None) -> None:
    expected = brute_force(costs, stages, memory_bytes, waiting)
    if expected is None:
        with pytest.raises(UserError, match="No cut"):
            solve(costs, stages, memory_bytes=memory_bytes, microbatches=waiting)
        return
    cuts = solve(costs, stages, memory_bytes=memory_bytes, microbatches=waiting)
    assert len(cuts) == stages - 1
    assert list(cuts) == sorted(set(cuts))
    assert slowest_stage(costs, cuts) == expected


@pytest.mark.parametrize("stages", [2, 3])
def test_the_cut_of_a_measured_network_is_the_best_of_all(stages: int) -> None:
    torch.manual_seed(0)
    network = build_model("yolo11n", 3).train()
    before = copy.deepcopy(network.state_dict())
    costs = list(measure(network, images=2, size_hw=(64, 64), amp_dtype=None, rounds=1))
    assert len(costs) == len(network.nodes)
    assert all(cost.seconds > 0 for cost in costs)
    assert slowest_stage(costs, solve(costs, stages)) == brute_force(costs, stages, None, None)
    assert network.training
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_measuring_leaves_no_trace(is_wrapped: bool) -> None:
    """Not in weights, statistics, what norms hold for an update, gradients, modes, or random numbers to come."""
    network = build_model("yolo11n", 3)
    norms = BatchStatistics(network) if is_wrapped else None
    network.train()
    network.nodes[3].module.eval()
    if norms is not None:
        with norms.part():
            network(torch.rand(2, 3, 64, 64))
    weight = next(network.parameters())
    weight.grad = torch.full_like(weight, 3.0)
    modes = [module.training for module in network.modules()]
    kept = [*network.state_dict().values(), *(norms.state() if norms else []), weight.grad, torch.get_rng_state()]
    before = [value.clone() for value in kept]
    measure(network, images=2, size_hw=(64, 64), amp_dtype=torch.bfloat16, rounds=1)
    after = [*network.state_dict().values(), *(norms.state() if norms else []), weight.grad, torch.get_rng_state()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert [module.training for module in network.modules()] == modes
    assert all(parameter.grad is None for parameter in list(network.parameters())[1:])


def test_nodes_are_measured_as_a_step_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, with the norms of a step, the neck's joins left out, and nothing backward that nobody asks for."""
    taken: list[tuple[torch.nn.Module, list[torch.Tensor], tuple[torch.Tensor, ...]]] = []
    run_node = partition._run_node

    def noted(module: torch.nn.Module, given: list[torch.Tensor], *others: Any) -> Any:
        found = run_node(module, given, *others)
        taken.append((module, given, found[2]))
        return found

    monkeypatch.setattr(partition, "_run_node", noted)
    network = build_model("yolo11n", 3).eval()
    freeze_nodes(network, 2)
    costs = measure(network, images=2, size_hw=(64, 64), amp_dtype=torch.bfloat16, rounds=1)
    first = [entry for number, entry in enumerate(taken) if number % 2 == 0]  # each is run twice
    joins = [number for number, node in enumerate(network.nodes) if isinstance(node.module, Concat)]
    assert len(first) == len(network.nodes) - len(joins)
    norms = [norm for module, _, _ in taken for norm in module.modules() if isinstance(norm, torch.nn.BatchNorm2d)]
    assert all(isinstance(norm, BatchNorm) for norm in norms)
    assert [module.training for module, _, _ in first[:4]] == [False, False, True, True]
    images = first[0][1][0]
    assert (images.dtype, images.requires_grad) == (torch.bfloat16, False)
    assert not any(tensor.requires_grad for _, given, _ in first[:3] for tensor in given)
    assert all(tensor.requires_grad for _, given, _ in first[3:] for tensor in given)
    numbers = [number for number in range(len(network.nodes)) if number not in joins]
    assert all(len(first[numbers.index(join + 1)][1]) == 2 for join in joins), "maps that are not joined"
    assert all(costs[join].kept_bytes == 0 for join in joins)


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_what_crosses_is_what_stages_give(amp_dtype: torch.dtype | None) -> None:
    """After every node, the joins that are left to the next one among them."""
    network = build_model("yolo11n", 3)
    costs = measure(network, images=2, size_hw=(64, 96), amp_dtype=amp_dtype, rounds=1)
    for stop in range(1, len(network.nodes)):
        with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
            live = network.segment(0, stop)(torch.rand(2, 3, 64, 96, dtype=amp_dtype or torch.float32))
        assert costs[stop - 1].crossing_bytes == sum(value.numel() * value.element_size() for value in live), stop


def test_bytes_are_those_of_the_tensors() -> None:
    network = build_model("yolov8n", 3)
    costs = measure(network, images=2, size_hw=(64, 96), amp_dtype=None, rounds=1)
    # after node 4, one value lives on: 64 channels at stride 8; after node 6, that one and 128 channels at stride 16
    at_stride_8, at_stride_16 = 2 * 64 * 8 * 12 * 4, 2 * 128 * 4 * 6 * 4
    assert costs[4].crossing_bytes == at_stride_8
    assert costs[6].crossing_bytes == at_stride_8 + at_stride_16
    assert costs[-1].crossing_bytes == 0
    # node 0 keeps its images, and at stride 2 what the norm was given, and where that is torch's, the activation too
    images, maps, kept = 2 * 3 * 64 * 96 * 4, 2 * 16 * 32 * 48 * 4, 2 if norm.kernels() is None else 1
    assert images + kept * maps <= costs[0].kept_bytes <= images + (kept + 1) * maps
    assert costs[0].state_bytes == 4 * 4 * sum(p.numel() for p in network.nodes[0].module.parameters())
