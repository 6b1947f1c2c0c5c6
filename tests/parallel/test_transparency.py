"""Transparency: however a run is laid out over ranks, it is the run of one process.

Every case trains a small detector for some updates and compares losses, parameters, statistics of batch norms, moving
average and optimiser state with those of one process that saw the same micro-batches. All cases of one number of ranks
share one start of their processes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import pytest
import torch
from comparison import DOUBLE_BOUND, assert_same_run, single_of
from training_runs import Run, go_on, train
from worlds import Case, run_to_files, take

if TYPE_CHECKING:
    from pathlib import Path

MODELS = ("yolov8n", "yolo11n")


def layouts(model: str, optimizer: str) -> dict[str, tuple[int, Run]]:
    """Runs that have to equal the single one, by name, each with its number of ranks."""
    base = Run(model=model, optimizer=optimizer)
    return {
        "data x2": (2, replace(base, engine="data")),
        "data x4": (4, replace(base, engine="data")),
        "fsdp x2": (2, replace(base, engine="fsdp")),
        "pipeline x2": (2, replace(base, engine="data", stages=2)),
        "pipeline x2, gpipe": (2, replace(base, engine="data", stages=2, schedule="gpipe")),
        "pipeline x3": (3, replace(base, engine="data", stages=3)),
        "hybrid 2x2": (4, replace(base, engine="data", stages=2)),
    }


def all_cases() -> dict[str, tuple[int, Run]]:
    """Every case by name."""
    cases: dict[str, tuple[int, Run]] = {}
    for model in MODELS:
        for optimizer in ("SGD", "AdamW"):
            for layout, (world, run) in layouts(model, optimizer).items():
                cases[f"{model} {optimizer} {layout}"] = world, run
    for world in (2, 4):
        whole = Run(model="yolo11n", engine="data", bn="sync", parts=world)
        cases[f"whole batch by bn=sync, data x{world}"] = world, whole
        cases[f"whole batch by bn=sync, data x{world}, AdamW"] = world, replace(whole, optimizer="AdamW")
        cases[f"whole batch by bn=sync, data x{world}, ranks without boxes"] = world, replace(whole, empty=(1, 3, 5, 7))
        cases[f"data x{world}, ranks without boxes"] = (
            world,
            Run(model="yolo11n", engine="data", parts=world, empty=(1, 3, 5, 7)),
        )
        cases[f"float32, data x{world}"] = world, Run(model="yolo11n", engine="data", dtype=torch.float32)
    for name, (world, run) in layouts("yolov8n", "SGD").items():
        if world == 2:
            cases[f"frozen nodes, {name}"] = world, replace(run, freeze=6, updates=2)
    cases["uneven shares, data x2"] = 2, Run(model="yolo11n", engine="data", images=7, parts=2)
    return cases


CASES = all_cases()
QUICK = {
    "yolo11n AdamW data x2",
    "yolo11n SGD fsdp x2",
    "yolo11n AdamW pipeline x2",
    "whole batch by bn=sync, data x2, ranks without boxes",
    "uneven shares, data x2",
    "float32, data x2",
}
"""What `make test` runs; `make test-all` runs all."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Path]:
    """Files with what the chosen cases gave, some 50 MB each; one start of processes per number of ranks."""
    chosen = {
        item.callspec.params["case"] for item in request.session.items if "case" in getattr(item, "fixturenames", ())
    }
    found: dict[str, Path] = {}
    for world in sorted({world for world, _ in CASES.values()}):
        cases = {
            name: Case("training_runs", "train", {"run": run})
            for name, (ranks, run) in CASES.items()
            if ranks == world and name in chosen
        }
        if world == 2 and "going on" in chosen:
            cases |= {
                name: Case("training_runs", "go_on", {"first": first, "second": second})
                for name, (first, second) in GOING_ON.items()
            }
        if cases:
            found |= run_to_files(tmp_path_factory.mktemp(f"world{world}"), world, cases, limit_s=900.0)
    return found


GOING_ON = {
    "data x2 to pipeline x2": (Run(engine="data"), Run(engine="data", stages=2)),
    "pipeline x2 to fsdp x2": (Run(engine="data", stages=2), Run(engine="fsdp")),
    "fsdp x2 to data x2": (Run(engine="fsdp"), Run(engine="data")),
    "pipeline x2 to another cut": (Run(engine="data", stages=2), Run(engine="data", stages=2, shift=5)),
    "pipeline x2 to single": (Run(engine="data", stages=2), Run()),
}
"""Layouts that a run is interrupted under and goes on with, half an update being accumulated."""


@lru_cache(maxsize=4)  # a few layouts in a row are compared with the same run; all of them would fill the memory
def single(run: Run) -> dict[int, dict[str, Any]]:
    """What a run gave in one process."""
    return train(run)


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_every_layout_is_the_run_of_one_process(results: dict[str, Path], case: str) -> None:
    run = CASES[case][1]
    exact = single(replace(single_of(run), dtype=torch.float64)) if run.dtype is torch.float32 else None
    assert_same_run(take(results[case]), single(single_of(run)), run, exact)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["going on"])
def test_a_run_goes_on_under_any_layout(results: dict[str, Path], case: str) -> None:
    expected = go_on(Run(), None)
    for name in GOING_ON:
        found = take(results[name])
        for state, tensors in expected.items():
            assert found[state].keys() == tensors.keys()
            for key, value in tensors.items():
                torch.testing.assert_close(
                    found[state][key], value, rtol=DOUBLE_BOUND, atol=DOUBLE_BOUND, msg=f"{name}: {key}"
                )
