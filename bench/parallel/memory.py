"""A run that does not fit into one process under a memory limit, and does in two: yolo11x with AdamW.

    python bench/parallel/memory.py [--limit-mb 1600] [--imgsz 160]

Each process may have so many MB of private memory (RLIMIT_DATA). One process holds parameters, gradients, two moments
and the average of 57 million weights; two shards or two stages hold half of it each.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from paceline.batch import Batch
from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.build import Ranks
from paceline.parallel.layout import Layout
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer, plan_optimizer, update

LAYOUTS = {
    "one process": Layout(),
    "fsdp x2": Layout(shard=2),
    "pipeline x2": Layout(pipeline=2, microbatches=2),
}
IMAGES = 4


def rank_main(kind: str, rank: int, folder: Path, imgsz: int, limit_mb: int) -> None:
    layout = LAYOUTS[kind]
    torch.set_num_threads(1)
    if layout.devices > 1:
        store = dist.FileStore(str(folder / "store"), layout.devices)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.devices)
    torch.manual_seed(0)
    ranks = Ranks(layout, torch.device("cpu"))
    engine = ranks.engine(
        build_model("yolo11x", 2),
        DetectionLoss(LossConfig(), 2),
        batch=IMAGES,
        imgsz=imgsz,
        amp_dtype=None,
        clip=10.0,
        ledger=Ledger(),
        loss_scale=1.0,
    )
    resource.setrlimit(resource.RLIMIT_DATA, (limit_mb * 2**20, limit_mb * 2**20))
    plan = plan_optimizer(OptimConfig(optimizer="AdamW"), num_classes=2, updates=1, effective_batch=IMAGES)
    optimizer = build_optimizer(plan, engine.network, engine.parts.leaf)
    ema = Ema(engine.network, average=engine.parts.twin())
    engine.network.train()
    share = IMAGES // layout.replicas
    corners = torch.rand(share, 4, 2) * imgsz / 2
    batch = Batch(
        images=torch.randint(0, 256, (share, 3, imgsz, imgsz), dtype=torch.uint8),
        boxes=torch.cat((corners, corners + imgsz / 4), dim=-1),
        labels=torch.zeros(share, 4, dtype=torch.int64),
        valid=torch.ones(share, 4, dtype=torch.bool),
        samples=torch.arange(share),
        original_hw=torch.full((share, 2), imgsz),
    )
    parts = share // 2 if layout.pipeline == 1 else 1  # two images at a time, as in the pipeline
    for _ in range(2):
        for number in range(parts):
            rows = slice(2 * number, 2 * number + 2) if layout.pipeline == 1 else slice(None)
            part = Batch(**{name: getattr(batch, name)[rows] for name in batch.__dataclass_fields__})
            engine.accumulate(part, completes=number == parts - 1)
        update(optimizer, engine.gradient())
        ema.update()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (folder / f"rank{rank}.json").write_text(json.dumps(peak))
    if layout.devices > 1:
        dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--limit-mb", type=int, default=1600)
    parser.add_argument("--imgsz", type=int, default=160)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        return rank_main(arguments.kind, arguments.rank, arguments.folder, arguments.imgsz, arguments.limit_mb)
    results: dict[str, object] = {"limit_mb": arguments.limit_mb}
    for kind, layout in LAYOUTS.items():
        with tempfile.TemporaryDirectory() as name:
            command = [sys.executable, __file__, "--kind", kind, "--folder", name]
            command += ["--limit-mb", str(arguments.limit_mb), "--imgsz", str(arguments.imgsz)]
            processes = [
                subprocess.Popen(
                    [*command, "--rank", str(rank)],
                    env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
                    stderr=subprocess.PIPE,
                    text=True,
                )
                for rank in range(layout.devices)
            ]
            errors = [process.communicate()[1] for process in processes]
            fits = all(process.returncode == 0 for process in processes)
            last = next((text.strip().splitlines()[-1] for text in errors if text.strip()), "")
            peaks = [round(json.loads(path.read_text())) for path in sorted(Path(name).glob("rank*.json"))]
        results[kind] = {"fits": fits, "resident_peak_mb": peaks, "error": "" if fits else last[:160]}
        print(f"{kind:14}{'fits' if fits else 'does not fit':14}{peaks or last[:100]}")
    print(json.dumps(results))
    return None


if __name__ == "__main__":
    main()
