"""Whole runs by graphs: wired as on a GPU, with graphs that do their work again on the host."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch
from device_cases import Rerunner
from safetensors.torch import load_file

from paceline.commands.step_choice import RunStep
from paceline.commands.train import train
from paceline.options import TrainOptions

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def weights(data: Path, project: Path, name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    flat: dict[str, object] = {
        "data": str(data), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 3, "nbs": 8, "workers": 2,
        "amp": "off", "device": "cpu", "plots": False, "project": str(project), "name": name, "warmup_epochs": 1,
        "optimizer": "SGD", "tune_step": "off",
    }  # fmt: skip
    folder = train(TrainOptions.from_flat(flat)).folder
    lines = [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return load_file(folder.weights / "resume.safetensors"), epochs


def test_a_run_by_graphs_is_the_eager_run(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, _ = weights(squares, tmp_path, "eager")
    choose = RunStep.choose

    def with_graphs(self: RunStep) -> Any:
        choice = choose(self)
        return dataclasses.replace(choice, plan=dataclasses.replace(choice.plan, graphs=True))

    monkeypatch.setattr(RunStep, "choose", with_graphs)
    monkeypatch.setattr("paceline.commands.train.CudaCapture", lambda device: Rerunner())
    graphed, epochs = weights(squares, tmp_path, "graphed")
    assert graphed.keys() == eager.keys()
    for key, value in eager.items():
        torch.testing.assert_close(
            graphed[key], value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )
    assert epochs[0]["spans_s"]["capture"] > 0
    assert all(epoch["spans_s"]["step"] > 0 for epoch in epochs)
