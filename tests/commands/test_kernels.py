"""Kernels on trial: what speaks against them on one rank leaves them out on all, and is said once."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.commands import kernels
from paceline.training.precision import Precision


class Group:
    """Two ranks, of which the other has said what it thinks."""

    def __init__(self, *, other: bool) -> None:
        self.other = other
        self.asked: list[str] = []

    def first_on_node(self, name: str) -> Any:
        self.asked.append(name)
        return nullcontext()

    def any(self, name: str, value: bool) -> bool:
        self.asked.append(name)
        return value or self.other


@pytest.fixture
def distrusted(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Devices that are left to torch from now on; the machine has a GPU."""
    found: list[torch.device] = []
    monkeypatch.setattr(kernels, "distrust", found.append)
    monkeypatch.setattr(kernels.Machine, "of", lambda device: SimpleNamespace(bf16=True))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    return found


def network_on(device: str) -> Any:
    return SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=torch.device(device))]))


@pytest.mark.parametrize(("mine", "other"), [("", False), ("", True), ("a tensor is far", False)])
def test_one_objection_counts_for_all(
    mine: str,
    other: bool,
    distrusted: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    precisions: list[Precision] = []

    def objection(network: Any, criterion: Any, precision: Precision) -> str:
        precisions.append(precision)
        return mine

    monkeypatch.setattr(kernels, "objection", objection)
    group = Group(other=other)
    with caplog.at_level("WARNING", logger="paceline"):
        kernels.try_kernels(network_on("cuda:1"), lambda *given: None, "auto", group)  # type: ignore[arg-type]
    assert precisions == [Precision(name="bf16")]
    assert len(group.asked) == 2
    assert distrusted == ([torch.device("cuda:1")] if mine or other else [])
    assert len(caplog.messages) == bool(mine)
    assert not mine or "not used on this Some GPU: a tensor is far. Torch's take" in caplog.messages[0]


def test_on_a_cpu_nobody_is_asked(distrusted: list[torch.device]) -> None:
    group = Group(other=True)
    kernels.try_kernels(network_on("cpu"), lambda *given: None, "auto", group)  # type: ignore[arg-type]
    assert group.asked == []
    assert distrusted == []
