"""What tests/gpu does on a GPU, done on processors: the same cases, with boundaries copied as gloo needs it there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from device_cases import NeverWaits, steps_under
from training_runs import Run
from worlds import Case, run_world

from paceline.parallel.gather import wire_of
from paceline.parallel.stage import enter, leave, staged

if TYPE_CHECKING:
    from pathlib import Path

STAGED = {
    "pipeline x2": Run(engine="data", stages=2, staged=True),
    "pipeline x2, drawn": Run(engine="data", stages=2, staged=True, drawn=True),
}
ONE = {"data x1": Run(engine="data"), "fsdp x1": Run(engine="fsdp")}
TWO = {
    "data x2": Run(engine="data"),
    "pipeline x2, gpipe": Run(engine="data", stages=2, staged=True, schedule="gpipe"),
}


@pytest.mark.parametrize(
    ("world", "runs"),
    [
        pytest.param(2, STAGED, id="staged"),
        pytest.param(1, ONE, id="one rank", marks=pytest.mark.slow),
        pytest.param(2, TWO, id="two ranks", marks=pytest.mark.slow),
    ],
)
def test_every_engine_on_a_device_is_the_single_one_there(tmp_path: Path, world: int, runs: dict[str, Run]) -> None:
    cases = {name: Case("device_cases", "as_one_process", {"run": run}) for name, run in runs.items()}
    results = run_world(tmp_path, world, cases)
    assert {name: result["updates"] for name, result in results.items()} == {name: [1, 5] for name in runs}


def test_ranks_that_record_at_the_same_steps_are_the_eager_ones(tmp_path: Path) -> None:
    result = run_world(tmp_path, 2, {"ddp": Case("device_cases", "ddp_by_graphs", {"device": "cpu"})})["ddp"]
    assert result["graphs"] == [4, 1]
    assert max(result["differences"]) < 1e-12


@pytest.mark.parametrize("world", [1, 2])
def test_replays_at_frozen_addresses_are_the_eager_steps(tmp_path: Path, world: int) -> None:
    result = run_world(tmp_path, world, {"ddp": Case("device_cases", "ddp_by_frozen_addresses")})["ddp"]
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
