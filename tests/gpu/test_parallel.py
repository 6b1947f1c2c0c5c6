"""Engines over several ranks on one CUDA device, against the single engine there; tests/parallel does it without."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from device_cases import steps_under
from training_runs import Run
from waiting import errors_where_the_host_waits
from worlds import Case, run_world

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("engine", ["data", "fsdp"])
def test_a_world_of_one_by_nccl_is_the_single_engine(tmp_path: Path, engine: str) -> None:
    run = Run(engine=engine, device="cuda")  # type: ignore[arg-type]
    case = Case("device_cases", "as_one_process", {"run": run})
    result = run_world(tmp_path, 1, {engine: case}, backend="cpu:gloo,cuda:nccl")[engine]
    assert result == {"updates": [1, run.updates], "backend": "cpu:gloo,cuda:nccl", "device": "cuda"}


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(Run(engine="data", device="cuda"), id="data"),
        pytest.param(Run(engine="data", stages=2, device="cuda"), id="pipeline"),
        pytest.param(Run(engine="data", stages=2, device="cuda", schedule="gpipe"), id="pipeline, gpipe"),
    ],
)
def test_two_ranks_on_one_gpu_by_gloo_are_the_single_engine(tmp_path: Path, run: Run) -> None:
    case = Case("device_cases", "as_one_process", {"run": run})
    result = run_world(tmp_path, 2, {"run": case})["run"]
    assert result["updates"] == [1, run.updates]
    assert result["device"] == "cuda"


def test_a_step_never_waits_for_the_gpu() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        losses, not_finite = steps_under(errors_where_the_host_waits(), Run(dtype=torch.float32, device="cuda"))
    assert losses > 0
    assert not_finite == 0.0


def test_what_waits_for_the_gpu_is_noticed() -> None:
    value = torch.ones(3, device="cuda")
    with errors_where_the_host_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        value.sum().item()
