"""Copies that are read beside the steps: on a GPU they are complete, and what comes later does not reach them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.training.apart import Apart
from paceline.training.snapshot import HostSnapshot

MANY = 1 << 24


@pytest.mark.gpu
def test_a_snapshot_is_of_its_place_in_the_stream() -> None:
    value = torch.zeros(MANY, device="cuda")
    snapshot = HostSnapshot()
    for number in range(1, 6):
        for _ in range(50):
            value += 1  # the host is far ahead of the device when the copy is asked for
        copies = snapshot.take({"value": value, "on host": torch.tensor(number)})
        value += 1
        snapshot.wait()
        assert copies["value"].is_pinned()
        assert (copies["value"] == 51 * number - 1).all()
        assert copies["on host"] == number


@pytest.mark.gpu
def test_what_is_evaluated_is_what_the_network_was() -> None:
    device = torch.device("cuda", 0)
    network = nn.Linear(2048, 2048, bias=False, device=device)
    nn.init.zeros_(network.weight)
    found: list[torch.Tensor] = []
    streams: list[torch.cuda.Stream] = []

    def evaluate(copied: nn.Module, stops: object) -> None:
        streams.append(torch.cuda.current_stream(device))
        found.append(next(copied.parameters()).detach().clone())

    apart = Apart(evaluate, device=device, alone=True)
    for epoch in range(1, 5):
        with torch.no_grad():
            for _ in range(200):
                network.weight += 1
        apart.start(epoch, network)
        with torch.no_grad():
            for _ in range(200):
                network.weight += 1
        apart.wait()
        assert apart.answer() is None
        kept = apart.take()
        expected = float(400 * epoch - 200)
        assert (found[-1] == expected).all()
        assert all((value == expected).all() for value in kept.state_dict().values())
    assert all(stream != torch.cuda.default_stream(device) for stream in streams)
