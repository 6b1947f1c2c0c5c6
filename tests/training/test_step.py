"""Laws of the eager step: it never waits for the device, and its state never moves in memory."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from device_cases import NeverWaits
from steps import make_step, run, works

from paceline.ledger import Ledger
from paceline.models.registry import build_model
from paceline.training.ema import Ema

if TYPE_CHECKING:
    from paceline.training.step import EagerStep


def yolo(optimizer: str = "SGD", **options: Any) -> EagerStep:
    torch.manual_seed(0)
    return make_step(optimizer, network=build_model("yolo11n", 3), **({"dtype": torch.float32} | options))


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("loss_scale", [1.0, 64.0])
def test_accumulating_and_completing_never_ask_the_device(optimizer: str, loss_scale: float) -> None:
    step, asked = yolo(optimizer, loss_scale=loss_scale), works(20, optimizer)[16:20]
    assert {work.completes for work in asked} == {True, False}
    with NeverWaits():
        said = run(step, asked)
    assert all(torch.isfinite(values).all() for values in said)


def test_a_step_runs_where_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device tensors have no values: what reads one, or copies one to the host, raises."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know this device
    updated = []
    monkeypatch.setattr(torch, "_fused_sgd_", lambda values, *_, **__: updated.append(len(values)))  # nor this one
    step = yolo(device="meta", fixed_shapes=False)
    said = run(step, works(20, device="meta")[16:20])
    assert all(values.is_meta for values in said)
    assert sum(updated) > 3 * len(list(step.engine.network.parameters()))
    with pytest.raises(RuntimeError, match="meta"):
        said[0].sum().item()
    with pytest.raises(NotImplementedError, match="meta"):
        said[0].cpu()


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_no_state_moves_in_memory(optimizer: str) -> None:
    step, asked = make_step(optimizer, loss_scale=8.0), works(24, optimizer)
    before = [(value, value.data_ptr()) for value in step.state()]
    values = [value.detach().clone() for value in step.state()]
    run(step, asked)
    after = step.state()
    assert len(after) == len(before)
    for (value, address), now in zip(before, after, strict=True):
        assert now is value
        assert now.data_ptr() == address
    assert sum(not torch.equal(old, new) for old, new in zip(values, after, strict=True)) > len(values) / 2


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_copies_of_its_state_are_all_it_takes_to_go_back(optimizer: str) -> None:
    step, asked = make_step(optimizer), [work for work in works(30, optimizer) if work.completes]
    run(step, asked[:3])
    saved = [value.detach().clone() for value in step.state()]
    first = run(step, asked[3:6])
    with torch.no_grad():
        torch._foreach_copy_(step.state(), saved)
    step.ema.updates -= 3
    torch.testing.assert_close(run(step, asked[3:6]), first, rtol=0, atol=0)


def test_a_step_books_its_time_on_the_parts_of_an_engine() -> None:
    ledger = Ledger()
    run(make_step(ledger=ledger), works(2))
    spans = ledger.lap().spans_s
    assert {"forward", "loss", "backward", "optimiser"} <= spans.keys()


def test_an_average_whose_tensors_lie_otherwise_is_refused() -> None:
    network = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    with pytest.raises(AssertionError):
        Ema(network, average=torch.nn.Conv2d(3, 4, 3))
