"""Compiled nodes under DDP: the same training as uncompiled, with accumulation and average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from training_runs import Run
from worlds import Case, run_world

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.slow
def test_compiled_nodes_train_under_ddp_as_uncompiled_ones(tmp_path: Path) -> None:
    run = Run(engine="data", updates=2, parts=4, images=8)
    cases = {
        str(backend): Case("compiled_cases", "train_compiled", {"run": run, "backend": backend})
        for backend in (None, "aot_eager")
    }
    found = run_world(tmp_path, 2, cases)
    (expected, _), (compiled, failure) = found["None"], found["aot_eager"]
    assert failure == ""
    for kind, tensors in expected.items():
        for key, value in tensors.items():
            torch.testing.assert_close(compiled[kind][key], value, rtol=1e-8, atol=1e-10, msg=f"{kind} {key}")
