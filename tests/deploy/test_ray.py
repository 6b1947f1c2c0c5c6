"""Ray Train: the recipe is run by Ray itself with CPU workers, and a worker joins the group that Ray made."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is missing (pip install 'paceline[ray]')"),
]

JOIN = """
import os, runpy, sys

def meet(options):
    import torch, torch.distributed as dist
    from paceline.parallel.config import LimitsConfig
    from paceline.parallel.process_group import joined
    with joined(backend="gloo", limits=LimitsConfig()) as group:
        with group.first_on_node("index"):
            open(options["order"], "a").write(str(group.rank.rank))
        group.agree("start", {{"code": "same"}})
        total = torch.ones(1) * (group.rank.rank + 1)
        dist.all_reduce(total)
    assert dist.is_initialized()  # Ray's own group is left alone
    figures = total.item(), group.rank.world, group.rank.local_world
    open(options["order"] + str(group.rank.rank), "w").write(str(figures))

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
TorchTrainer(
    meet,
    train_loop_config={{"order": {order!r}}},
    scaling_config=ScalingConfig(num_workers=2, use_gpu=False),
    run_config=RunConfig(storage_path={folder!r}, name="meet"),
).fit()
sys.argv = ["ray_train.py", "2", "--cpu", *{words!r}]
runpy.run_path({recipe!r}, run_name="__main__")
"""


def test_ray_trains(squares: Path, tmp_path: Path) -> None:
    order = tmp_path / "order"
    words = [f"data={squares}", "imgsz=64", "batch=4", "epochs=2", "nbs=4", "amp=off", "plots=false", "workers=1"]
    words += [f"project={tmp_path / 'runs'}", "name=mine"]
    script = JOIN.format(
        recipe=str(ROOT / "deploy" / "ray_train.py"), order=str(order), folder=str(tmp_path / "ray"), words=words
    )
    environment = os.environ | {
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
    }
    file = tmp_path / "script.py"
    start = "import ray; ray.init(num_cpus=2, include_dashboard=False)\n"
    file.write_text(start + script)
    run = subprocess.run(
        [sys.executable, str(file)], check=False, capture_output=True, text=True, timeout=400, env=environment
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert [Path(f"{order}{rank}").read_text() for rank in (0, 1)] == ["(3.0, 2, 2)"] * 2
    assert order.read_text() == "01"
    assert (tmp_path / "runs" / "mine" / "DONE").exists()
    assert f"The run is in {tmp_path / 'runs' / 'mine'}." in run.stdout
