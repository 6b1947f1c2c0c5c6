"""Laws of the partition: the chosen cut is the best of all cuts."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import UserError
from paceline.models.registry import build_model
from paceline.parallel.partition import NodeCost, measure, solve, stage_bytes, stage_seconds

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


def test_bytes_are_those_of_the_tensors() -> None:
    network = build_model("yolov8n", 3)
    costs = measure(network, images=2, size_hw=(64, 96), amp_dtype=None, rounds=1)
    # after node 4, one value lives on: 64 channels at stride 8; after node 6, that one and 128 channels at stride 16
    at_stride_8, at_stride_16 = 2 * 64 * 8 * 12 * 4, 2 * 128 * 4 * 6 * 4
    assert costs[4].crossing_bytes == at_stride_8
    assert costs[6].crossing_bytes == at_stride_8 + at_stride_16
    assert costs[-1].crossing_bytes == 0
    # node 0 keeps its images, and at stride 2 what the convolution, the norm and the activation were given
    images, maps = 2 * 3 * 64 * 96 * 4, 2 * 16 * 32 * 48 * 4
    assert images + 2 * maps <= costs[0].kept_bytes <= images + 3 * maps
    assert costs[0].state_bytes == 4 * 4 * sum(p.numel() for p in network.nodes[0].module.parameters())
