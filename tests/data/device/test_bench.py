from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[3] / "bench" / "render" / "gpu.py"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without a GPU")
def test_the_bench_says_that_it_needs_a_gpu() -> None:
    run = subprocess.run([sys.executable, str(BENCH)], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "needs a CUDA GPU" in run.stderr
