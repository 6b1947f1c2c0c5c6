"""Laws of batch norms: running statistics are those of the definition, ranks that normalise together are one batch."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from norm_cases import CHANNELS, maps, norm
from torch import nn
from worlds import Case, run_world

from paceline.models.fusion import fuse
from paceline.models.registry import build_model
from paceline.parallel.norms import BatchNorm, BatchStatistics


def test_with_one_part_per_update_it_is_the_plain_norm() -> None:
    plain, ours = norm(), norm()
    statistics = BatchStatistics(ours)
    for number in range(3):
        results = []
        for network in (plain, ours):
            values, gradient = maps(4, seed=number)
            values.requires_grad_(True)
            with statistics.part() if network is ours else nullcontext():
                network(values).backward(gradient)
            results.append(values.grad)
        statistics.commit()
        torch.testing.assert_close(results[1], results[0])
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    values = maps(2, seed=9)[0]
    torch.testing.assert_close(ours.eval()(values), plain.eval()(values))


def expected_statistics(
    parts: list[list[torch.Tensor]], *, momentum: float = 0.03
) -> tuple[torch.Tensor, torch.Tensor]:
    """The definition, written out: one list of parts per update."""
    mean, variance = torch.zeros(CHANNELS, dtype=torch.float64), torch.ones(CHANNELS, dtype=torch.float64)
    for update in parts:
        means = torch.stack([part.mean((0, 2, 3)) for part in update]).mean(0)
        variances = torch.stack([part.var((0, 2, 3), correction=1) for part in update]).mean(0)
        kept = (1 - momentum) ** len(update)
        mean = kept * mean + (1 - kept) * means
        variance = kept * variance + (1 - kept) * variances
    return mean, variance


def run(network: nn.Module, statistics: BatchStatistics, parts: list[list[torch.Tensor]]) -> None:
    for update in parts:
        for part in update:
            with statistics.part():
                network(part)
        statistics.commit()


def test_batches_of_an_update_count_alike_whatever_their_size() -> None:
    parts = [[maps(images, seed=10 * update + images)[0] for images in sizes] for update, sizes in enumerate(SIZES)]
    network = norm()
    run(network, BatchStatistics(network), parts)
    mean, variance = expected_statistics(parts)
    torch.testing.assert_close(network[0].running_mean, mean)
    torch.testing.assert_close(network[0].running_var, variance)
    assert network[0].num_batches_tracked == len(SIZES)


SIZES = ([2, 2, 2], [3], [1, 4, 2, 2])


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_parts_of_one_batch_count_as_one_batch(cuts: int) -> None:
    """The statistics forget as much with a batch, however it is cut; what they move to is the mean of its parts."""
    parts = [maps(2, seed=number)[0] for number in range(cuts)]
    network = norm()
    statistics = BatchStatistics(network)
    for part in parts:
        with statistics.part(1 / cuts):
            network(part)
    statistics.commit()
    means = torch.stack([part.mean((0, 2, 3)) for part in parts]).mean(0)
    torch.testing.assert_close(network[0].running_mean, 0.03 * means)


def test_an_accumulation_forgets_as_fast_as_its_batches_alone() -> None:
    values = maps(4, seed=3)[0]
    alone, accumulated = norm(), norm()
    run(alone, BatchStatistics(alone), [[values]] * 4)
    run(accumulated, BatchStatistics(accumulated), [[values] * 4])
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(accumulated[0], name), getattr(alone[0], name))


def test_a_commit_without_parts_and_an_evaluation_change_nothing() -> None:
    network = norm()
    statistics = BatchStatistics(network)
    run(network, statistics, [[maps(2, seed=1)[0]]])
    before = copy.deepcopy(network.state_dict())
    statistics.commit()
    network.eval()
    run(network, statistics, [[maps(2, seed=2)[0]]])
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_parts_can_be_saved_and_put_back() -> None:
    parts = [maps(2, seed=number)[0] for number in range(3)]
    undisturbed = norm()
    run(undisturbed, BatchStatistics(undisturbed), [parts])
    first, second = norm(), norm()
    statistics = BatchStatistics(first)
    for part in parts[:2]:
        with statistics.part():
            first(part)
    saved = {key: value.clone() for key, value in statistics.pending().items()}
    resumed = BatchStatistics(second)
    resumed.load_pending(saved)
    run(second, resumed, [parts[2:]])
    for key, value in undisturbed.state_dict().items():
        torch.testing.assert_close(second.state_dict()[key], value)
    assert resumed.pending() == {}


def test_a_part_that_is_not_finite_is_forgotten_with_its_update() -> None:
    """What such an update does to the weights is left out, so it must not show in the statistics either."""
    network = norm()
    statistics = BatchStatistics(network)
    for value in (float("nan"), float("inf")):
        with statistics.part():
            network(torch.full((2, CHANNELS, 3, 3), value, dtype=torch.float64))
        statistics.commit()
    for key in ("running_mean", "running_var"):
        assert torch.equal(network[0].state_dict()[key], norm()[0].state_dict()[key])
    run(network, statistics, [[maps(2, seed=1)[0]]])
    usual = norm()
    run(usual, BatchStatistics(usual), [[maps(2, seed=1)[0]]])
    torch.testing.assert_close(network[0].running_mean, usual[0].running_mean)
    torch.testing.assert_close(network[0].running_var, usual[0].running_var)


def test_of_a_part_the_finite_channels_count() -> None:
    network, usual = norm(), norm()
    values = maps(2, seed=1)[0]
    run(usual, BatchStatistics(usual), [[values]])
    values = values.clone()
    values[0, 0, 0, 0] = float("inf")
    run(network, BatchStatistics(network), [[values]])
    for key in ("running_mean", "running_var"):
        found, expected = network[0].state_dict()[key], usual[0].state_dict()[key]
        torch.testing.assert_close(found[1:], expected[1:])
        assert torch.equal(found[0], norm()[0].state_dict()[key][0])


def test_a_network_keeps_its_keys_its_copies_and_its_fusion() -> None:
    torch.manual_seed(0)
    network = build_model("yolo11n", 3)
    keys = list(network.state_dict())
    optimised = list(network.parameters())
    BatchStatistics(network)
    assert list(network.state_dict()) == keys
    assert all(mine is theirs for mine, theirs in zip(network.parameters(), optimised, strict=True))
    assert any(isinstance(module, BatchNorm) for module in network.modules())
    copied = copy.deepcopy(network).eval()
    images = torch.rand(1, 3, 64, 64)
    for found, expected in zip(fuse(network)(images), copied(images), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, torch.Tensor]]]:
    cases = {
        "equal": Case("norm_cases", "synchronised", {"images": (3, 3)}),
        "unequal": Case("norm_cases", "synchronised", {"images": (1, 4), "channels_last": True}),
    }
    return run_world(tmp_path_factory.mktemp("norms"), 2, cases)


@pytest.mark.parametrize(("case", "images"), [("equal", (3, 3)), ("unequal", (1, 4))])
def test_ranks_that_normalise_together_are_one_batch(
    two_ranks: dict[str, list[dict[str, torch.Tensor]]], case: str, images: tuple[int, int]
) -> None:
    ranks = two_ranks[case]
    network = norm()
    statistics = BatchStatistics(network)
    for part in range(2):
        values, gradient = maps(sum(images), seed=part)
        values.requires_grad_(True)
        with statistics.part():
            output = network(values)
        output.backward(gradient)
        torch.testing.assert_close(torch.cat([rank[f"output{part}"] for rank in ranks]), output.detach())
        torch.testing.assert_close(torch.cat([rank[f"gradient{part}"] for rank in ranks]), values.grad)
    statistics.commit()
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(sum(rank[f"grad.{name}"] for rank in ranks), parameter.grad)
    for rank in ranks:
        for key in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(rank[key], network.state_dict()[key])
