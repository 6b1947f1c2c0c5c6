"""Checkpoints: whole or not at all, and equal to what went in."""

from __future__ import annotations

import errno
import json
import os
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from paceline.errors import UserError
from paceline.training.checkpoint import (
    ResumePoint,
    WeightsHeader,
    load_optimizer_tensors,
    load_resume_point,
    load_weights,
    optimizer_tensors,
    save_resume_point,
    save_weights,
)
from paceline.training.config import OptimConfig
from paceline.training.optim import build_optimizer, plan_optimizer, update

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.training.optimizer import Optimizer

HEADER = WeightsHeader(model="yolo11n", names=("a", "ü"), imgsz=320, epoch=3, metrics={"ap": 0.5})


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    return {"model.0.weight": weight, "count": torch.tensor(7)}


def test_weights_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "weights" / "best.safetensors"
    save_weights(path, tensors(), HEADER)
    loaded, header = load_weights(path)
    assert header == HEADER
    assert loaded.keys() == tensors().keys()
    for key, value in tensors().items():
        assert torch.equal(loaded[key], value)
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["best.json", "best.safetensors"]


def test_a_torn_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, tensors(), HEADER)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="torn"):
        load_weights(path)


def test_a_missing_or_foreign_header_is_named(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, tensors(), HEADER)
    path.with_suffix(".json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(UserError, match="does not describe Paceline weights"):
        load_weights(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(UserError, match="copy both files"):
        load_weights(path)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, tensors(), HEADER)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_weights(path, {"other": torch.zeros(1)}, HEADER)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.json", "best.safetensors"]


def test_resume_points_round_trip_and_say_when_they_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "resume.safetensors"
    save_resume_point(path, ResumePoint(tensors=tensors(), values={"state": {"epoch": 4}, "ema_updates": 9}))
    point = load_resume_point(path)
    assert point.values["state"] == {"epoch": 4}
    assert torch.equal(point.tensors["model.0.weight"], tensors()["model.0.weight"])
    with pytest.raises(UserError, match="cannot be resumed"):
        load_resume_point(tmp_path / "none.safetensors")


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_an_optimiser_goes_on_as_if_undisturbed(name: str) -> None:
    def setup() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
        plan = plan_optimizer(OptimConfig(optimizer=name), num_classes=3, updates=1, effective_batch=64)  # type: ignore[arg-type]
        return network, build_optimizer(plan, network)

    def step(network: nn.Module, optimizer: Optimizer, seed: int) -> None:
        images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        network(images).square().sum().backward()
        update(optimizer, torch.zeros(()))

    network, optimizer = setup()
    step(network, optimizer, 1)
    saved_network = {key: value.clone() for key, value in network.state_dict().items()}
    saved = {key: value.clone() for key, value in optimizer_tensors(optimizer, network).items()}
    step(network, optimizer, 2)
    resumed, resumed_optimizer = setup()
    resumed.load_state_dict(saved_network)
    load_optimizer_tensors(resumed_optimizer, resumed, saved)
    step(resumed, resumed_optimizer, 2)
    for key, value in network.state_dict().items():
        assert torch.equal(resumed.state_dict()[key], value), key


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_gradient_that_is_not_finite_changes_nothing(name: str) -> None:
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    plan = plan_optimizer(OptimConfig(optimizer=name), num_classes=3, updates=1, effective_batch=64)  # type: ignore[arg-type]
    optimizer = build_optimizer(plan, network)
    before = [parameter.clone() for parameter in network.parameters()]
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    update(optimizer, torch.ones(()))
    for parameter, value in zip(network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.grad is None
