"""A whole run chooses its step by measurement, says so, and the next one remembers."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch

from paceline.commands.train import train
from paceline.options import TrainOptions

if TYPE_CHECKING:
    from pathlib import Path

    from paceline.training.candidates import StepTask
    from paceline.training.machine import Machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(data: Path, project: Path, **flat: object) -> dict[str, Any]:
    """Train for one epoch; returns the record of the start."""
    usual: dict[str, object] = {
        "data": str(data), "model": "yolo11n", "imgsz": 64, "batch": 4, "epochs": 1, "workers": 1, "device": "cpu",
        "plots": False, "project": str(project),
    }  # fmt: skip
    result = train(TrainOptions.from_flat(usual | flat))
    lines = [json.loads(line) for line in (result.folder.path / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert all(epoch["loss"]["box"] > 0 for epoch in epochs)
    (record,) = [line for line in lines if line["kind"] == "run"]
    assert record["precision"] in record["step"]
    return record


def test_the_second_run_remembers(
    squares: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("paceline.training.choice.SHORT_SHARE", 1e9)  # else this run is too short to measure
    monkeypatch.setattr("paceline.training.choice.QUICK_S", 200.0)  # a busy machine is to time all candidates
    monkeypatch.setattr("paceline.training.choice.QUICK_MOST_S", 200.0)
    with caplog.at_level(logging.INFO, "paceline"):
        first = run(squares, tmp_path / "runs")
    for name in ("fp32 channels-last", "fp32 channels-first", "bf16 channels-last", "bf16 channels-first"):
        assert f"{name} " in first["step"]
    assert "measured now" in first["step"]
    assert f"Step: {first['step']}." in [record.message for record in caplog.records]
    (file,) = (cache / "steps").iterdir()
    second = run(squares, tmp_path / "runs")
    assert f"delete {file} to measure again" in second["step"]
    assert second["precision"] == first["precision"]
    assert "measured now" in run(squares, tmp_path / "runs", batch=2)["step"], "another batch, another key"


def test_a_short_run_and_off_take_the_default(squares: Path, tmp_path: Path, cache: Path) -> None:
    assert "too short to measure" in run(squares, tmp_path / "runs")["step"]
    assert "tune_step=off" in run(squares, tmp_path / "runs", tune_step="off")["step"]
    assert "deterministic" in run(squares, tmp_path / "runs", deterministic=True)["step"]
    assert not (cache / "steps").exists()


def test_a_run_in_the_other_layout_trains_and_evaluates(
    squares: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.training.plan import StepPlan
    from paceline.training.precision import Precision

    first = (StepPlan(precision=Precision(name="fp32"), channels_last=False),)
    monkeypatch.setattr("paceline.training.choice.candidates", lambda task, machine: first)
    assert run(squares, tmp_path / "runs", tune_step="off")["step"].startswith("fp32 channels-first")


def test_kernels_are_compiled_ahead_in_runs_that_try_nothing(
    squares: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the network is wrapped or laid out; not where what is trained is compiled, or lies the other way."""
    ahead: list[tuple[str, int]] = []

    def compile_ahead(network: Any, criterion: Any, amp_dtype: Any) -> None:
        ahead.append((str(amp_dtype), len(list(network.parameters()))))
        assert callable(criterion)

    monkeypatch.setattr("paceline.commands.step_choice.compile_ahead", compile_ahead)
    run(squares, tmp_path / "runs", tune_step="off", amp="bf16")
    run(squares, tmp_path / "runs", deterministic=True, amp="off")
    assert [kind for kind, _ in ahead] == ["torch.bfloat16", "None"]
    assert all(count > 100 for _, count in ahead)
    ahead.clear()
    test_a_run_in_the_other_layout_trains_and_evaluates(squares, tmp_path, cache, monkeypatch)
    assert not ahead


def test_a_run_without_kernels_takes_all_its_steps_without(
    squares: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline import triton_kernels
    from paceline.losses.detection import DetectionLoss
    from paceline.training.plan import StepPlan
    from paceline.training.precision import Precision

    seen: list[bool] = []
    tasks: list[StepTask] = []

    def suits_kernels(loss: DetectionLoss, raw: torch.Tensor, logits: torch.Tensor) -> bool:
        seen.append(triton_kernels.usable(torch.device("cuda", 0)))
        return False

    monkeypatch.setattr(triton_kernels, "_works_on", lambda number: True)
    monkeypatch.setattr("paceline.commands.step_choice.usable", lambda device: True)
    monkeypatch.setattr(DetectionLoss, "_suits_kernels", suits_kernels)
    for kernels in (True, False):
        plans = (StepPlan(precision=Precision(name="fp32"), kernels=kernels),)

        def candidates(task: StepTask, machine: Machine, plans: tuple[StepPlan, ...] = plans) -> tuple[StepPlan, ...]:
            tasks.append(task)
            return plans

        monkeypatch.setattr("paceline.training.choice.candidates", candidates)
        record = run(squares, tmp_path / "runs", tune_step="off")
        assert ("without kernels" in record["step"]) == (not kernels)
        assert len(seen) >= 3
        assert set(seen) == {kernels}
        seen.clear()
    assert all(task.has_kernels for task in tasks), "the choice knows of them"
