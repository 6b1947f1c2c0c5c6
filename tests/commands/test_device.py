"""The device of a run: which one words mean, and that everything of the process goes there."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from paceline.commands.device import deterministic_algorithms, make_current, resolve_device
from paceline.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def current(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Let there be two GPUs; returns the devices that were made current."""
    made: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", made.append)
    return made


@pytest.mark.parametrize(
    ("text", "rank", "world", "expected"),
    [
        ("auto", 0, 1, "cuda:0"),
        ("1", 0, 1, "cuda:1"),
        ("cuda:1", 0, 1, "cuda:1"),
        ("auto", 1, 2, "cuda:1"),
        ("1,0", 1, 2, "cuda:0"),
        ("cpu", 1, 2, "cpu"),
    ],
)
def test_each_rank_works_on_its_own_device(
    current: list[torch.device], text: str, rank: int, world: int, expected: str
) -> None:
    device = make_current(resolve_device(text, local_rank=rank, local_world=world))
    assert device == torch.device(expected)
    assert current == ([device] if device.type == "cuda" else [])


def test_a_gpu_that_is_not_there_is_the_users_mistake(current: list[torch.device]) -> None:
    with pytest.raises(UserError, match="asks for GPU 2, but this machine has 2 GPUs"):
        resolve_device("2")
    assert current == []


def test_equal_bits_ask_libraries_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user has set for cuBLAS stays."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with deterministic_algorithms(alone=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with deterministic_algorithms(alone=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_equal_bits_are_asked_for_by_one_run_alone(*, before: bool, alone: bool) -> None:
    def asked() -> tuple[bool, bool, bool]:
        enabled = torch.are_deterministic_algorithms_enabled()
        warns = torch.is_deterministic_algorithms_warn_only_enabled()
        return enabled, warns, torch.utils.deterministic.fill_uninitialized_memory

    def end() -> None:
        with deterministic_algorithms(alone=alone):
            assert asked() == ((True, False, False) if alone else found)
            raise RuntimeError

    others = asked()
    torch.use_deterministic_algorithms(before, warn_only=before)
    try:
        found = asked()
        with pytest.raises(RuntimeError):
            end()
        assert asked() == found
    finally:
        torch.use_deterministic_algorithms(others[0], warn_only=others[1])


def test_a_training_makes_its_device_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from paceline import YOLO

    made: list[torch.device] = []

    def watched(device: torch.device) -> torch.device:
        made.append(device)
        raise UserError("enough")

    monkeypatch.setattr("paceline.commands.ready.make_current", watched)
    with pytest.raises(UserError, match="enough"):
        YOLO("yolo11n").train(data="shapes", device="cpu", project=str(tmp_path))
    assert made == [torch.device("cpu")]
