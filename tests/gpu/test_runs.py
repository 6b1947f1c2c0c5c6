"""Whole runs on a CUDA device: with graphs, kernels and evaluations beside the training; the same bits if asked for."""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from paceline.commands.step_choice import RunStep
from paceline.commands.train import train
from paceline.options import TrainOptions

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE, TYPE = "0", "bf16"


def trained(data: Path, project: Path, **more: object) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Weights that a run ends with, and its records of epochs."""
    flat: dict[str, object] = {
        "data": str(data), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 3, "nbs": 8, "workers": 2,
        "amp": TYPE, "device": DEVICE, "plots": False, "project": str(project), "optimizer": "SGD",
    }  # fmt: skip
    folder = train(TrainOptions.from_flat(flat | more)).folder
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    return load_file(folder.weights / "resume.safetensors"), [line for line in lines if line["kind"] == "epoch"]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    differ = [key for key, value in expected.items() if not torch.equal(found[key], value)]
    assert not differ, f"{len(differ)} of {len(expected)}: {differ[:5]}"


@pytest.mark.parametrize("more", [{}, {"val_async": True}, {"amp": "fp16"}, {"cache": "device"}], ids=str)
def test_a_run_takes_graphs_and_kernels_and_ends(
    squares: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, object],
) -> None:
    choose = RunStep.choose

    def with_graphs(self: RunStep) -> Any:  # such a short run would not look for them
        choice = choose(self)
        return dataclasses.replace(choice, plan=dataclasses.replace(choice.plan, graphs=True))

    monkeypatch.setattr(RunStep, "choose", with_graphs)
    with caplog.at_level(logging.INFO, logger="paceline"):
        weights, epochs = trained(squares, tmp_path, **more)
    assert all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())
    assert len(epochs) == 3
    assert epochs[0]["spans_s"]["capture"] > 0
    assert all(epoch["spans_s"]["step"] > 0 for epoch in epochs)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert not [text for text in warnings if "kernel" in text or "without one" in text], warnings


def test_deterministic_runs_end_with_the_same_bits_whenever_they_evaluate(squares: Path, tmp_path: Path) -> None:
    first, epochs = trained(squares, tmp_path / "first", deterministic=True)
    again, _ = trained(squares, tmp_path / "again", deterministic=True)
    assert_equal(again, first)
    assert epochs[0]["spans_s"]["capture"] > 0, "graphs, too"
    beside, _ = trained(squares, tmp_path / "beside", deterministic=True, val_async=True)
    assert_equal(beside, first)
