"""What tests/gpu does on a GPU, done on processors: the same cases, with boundaries copied as gloo needs it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from device_cases import NeverWaits, steps_under
from training_runs import Run
from worlds import Case, run_world

from paceline.parallel.build import exchanges_by_device
from paceline.parallel.gather import wire_of
from paceline.parallel.stage import enter, leave, staged

STAGED = {
    "pipeline x2": Run(engine="data", stages=2, staged=True),
    "pipeline x2, drawn": Run(engine="data", stages=2, staged=True, drawn=True),
}
ONE = {"data x1": Run(engine="data"), "fsdp x1": Run(engine="fsdp")}
TWO = {
    "data x2": Run(engine="data"),
    "pipeline x2, gpipe": Run(engine="data", stages=2, staged=True, schedule="gpipe"),
}


GROUPS: dict[str, tuple[int, dict[str, Case]]] = {
    name: (world, {key: Case("device_cases", "as_one_process", {"run": run}) for key, run in runs.items()})
    for name, world, runs in (("staged", 2, STAGED), ("one rank", 1, ONE), ("two ranks", 2, TWO))
} | {
    "graphs": (2, {"graphs": Case("device_cases", "ddp_by_graphs", {"device": "cpu"})}),
    "frozen x1": (1, {"frozen x1": Case("device_cases", "ddp_by_frozen_addresses")}),
    "frozen x2": (2, {"frozen x2": Case("device_cases", "ddp_by_frozen_addresses")}),
}
"""Numbers of ranks, and what they do."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the chosen groups gave; one start of processes per number of ranks."""
    chosen = {
        item.callspec.params["group"] for item in request.session.items if "group" in getattr(item, "fixturenames", ())
    }
    found: dict[str, Any] = {}
    for world in (1, 2):
        cases: dict[str, Case] = {}
        for name, (ranks, group) in GROUPS.items():
            if ranks == world and name in chosen:
                cases |= group
        if cases:
            found |= run_world(tmp_path_factory.mktemp(f"world{world}"), world, cases)
    return found


@pytest.mark.parametrize(
    "group",
    ["staged", pytest.param("one rank", marks=pytest.mark.slow), pytest.param("two ranks", marks=pytest.mark.slow)],
)
def test_every_engine_on_a_device_is_the_single_one_there(results: dict[str, Any], group: str) -> None:
    for name, case in GROUPS[group][1].items():
        assert results[name]["updates"] == [1, case.arguments["run"].updates]


@pytest.mark.parametrize("group", ["graphs"])
def test_ranks_that_record_at_the_same_steps_are_the_eager_ones(results: dict[str, Any], group: str) -> None:
    result = results[group]
    assert result["graphs"] == [4, 1]
    assert max(result["differences"]) < 1e-12


@pytest.mark.parametrize("group", ["frozen x1", "frozen x2"])
def test_replays_at_frozen_addresses_are_the_eager_steps(results: dict[str, Any], group: str) -> None:
    result = results[group]
    assert len(result["exchanges"]) == 4
    assert sorted(result["exchanges"])[:2] == [1, 1], "an accumulation exchanges its sums alone"
    assert sorted(result["exchanges"])[2] > 1, "an update exchanges its gradients too"
    assert result["difference"] < 1e-12


def test_a_step_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(dtype=torch.float32)
    with pytest.raises(RuntimeError, match="nonzero waits for the device"):
        steps_under(NeverWaits(), run)  # on processors the loss lists what it has to look at
    # Under the compiler it goes the way of other devices.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    losses, not_finite = steps_under(NeverWaits(), run)
    assert losses > 0
    assert not_finite == 0.0


@pytest.mark.parametrize("waits", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_what_waits_is_noticed(waits: Any) -> None:
    with NeverWaits(), pytest.raises(RuntimeError, match="waits for the device"):
        waits(torch.ones(3))


def test_copies_go_to_the_other_device_and_their_gradient_comes_back_contiguous() -> None:
    values = torch.randn(2, 5, 4, 6, requires_grad=True)
    assert staged(leave(values), torch.device("meta")).device.type == "meta"
    sent = staged(leave(values), torch.device("cpu"))
    assert sent.is_contiguous()
    assert not sent._is_view()
    arrived = sent.detach().requires_grad_(True)
    copy = staged(arrived, torch.device("cpu"))
    assert copy.data_ptr() != arrived.data_ptr()
    entered = enter(copy)
    assert torch.equal(entered, values)
    torch.cat((torch.zeros(2, 1, 4, 6), entered), dim=1).square().sum().backward()
    assert arrived.grad is not None
    assert arrived.grad.is_contiguous()
    sent.backward(arrived.grad)
    torch.testing.assert_close(values.grad, 2 * values.detach())


@pytest.mark.parametrize(
    ("backends", "device", "wire"),
    [
        ("cpu:gloo,cuda:gloo", "cuda", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda", None),
        ("cuda:nccl", "cuda", None),
        ("cpu:gloo,cuda:gloo", "cpu", None),
    ],
)
def test_gloo_sends_from_the_host_alone(
    monkeypatch: pytest.MonkeyPatch, backends: str, device: str, wire: str | None
) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: backends)
    found = wire_of(torch.device(device, 0), None)  # type: ignore[arg-type]
    assert found == (None if wire is None else torch.device(wire))


@pytest.mark.parametrize(
    ("ranks", "backends", "expected"),
    [
        (1, "", True),
        (2, "cpu:gloo,cuda:gloo", False),
        (2, "cpu:gloo,cuda:nccl", True),
        (2, "cuda:nccl", True),
        (2, "cpu:gloo", False),
    ],
)
def test_who_exchanges_gradients_is_known_before_an_engine_is_built(
    monkeypatch: pytest.MonkeyPatch, ranks: int, backends: str, expected: bool
) -> None:
    """As `DataEngine` decides, whose plan would else promise graphs that are none."""
    monkeypatch.setattr("paceline.parallel.build.num_ranks", lambda: ranks)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda: backends)
    assert exchanges_by_device() == expected
