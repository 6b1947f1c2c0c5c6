"""A training step on a CPU with norms by torch and by compiled code, with freed memory kept and not; ends in JSON.

Each of the four is a process of its own, since what the C library does with memory cannot be taken back; in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))

WAYS = {
    "torch": ("off", "given back"),
    "kept": ("off", "kept"),
    "compiled": ("", "given back"),
    "both": ("", "kept"),
}
"""Name of the way -> PACELINE_KERNELS, and what happens to freed memory."""


def measure(model: str, imgsz: int, batch: int, memory: str, steps: int) -> dict[str, float]:
    """Time whole steps on noise in this process."""
    import torch

    from paceline.losses.config import LossConfig
    from paceline.losses.detection import DetectionLoss
    from paceline.models.registry import build_model
    from paceline.options import TrainOptions
    from paceline.planning.noise import noise_batch
    from paceline.resident import keep_freed
    from paceline.training.machine import Machine
    from paceline.training.precision import precisions
    from paceline.training.recipe import Recipe
    from paceline.training.schedule import Rates
    from paceline.training.understudy import Cast, understudy

    if memory == "kept":
        keep_freed()
    cpu = torch.device("cpu")
    network = build_model(model, 3)
    criterion = DetectionLoss(LossConfig(), 3, strides=network.strides)
    recipe = Recipe.of(TrainOptions().optim, num_images=1000, num_classes=3, batch=batch, epochs=3)
    cast = Cast(network=network, criterion=criterion, optimizer=recipe.plan, freeze=0, clip=10.0)
    step = understudy(cast, precisions("auto", Machine.of(cpu), cpu)[0])
    images, rates = noise_batch(batch, imgsz, 3, dtype=None, device=cpu), Rates(lr=1e-6, bias_lr=1e-6, momentum=0.9)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        step(images, rates, completes=True)
        times.append(1000 * (time.perf_counter() - start))
    return {
        "ms": statistics.median(times[2:]),
        "resident_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", choices=("kept", "given back"), help="measure this once, in this process")
    options = parser.parse_args()
    if options.memory:
        found = measure(options.model, options.imgsz, options.batch, options.memory, options.steps)
        print("RESULT " + json.dumps(found))
        return
    from machine import machine

    task = [f"--{name}={getattr(options, name)}" for name in ("model", "imgsz", "batch", "steps")]
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
    for number in range(options.rounds):
        for name, (kernels, memory) in WAYS.items():
            done = subprocess.run(
                [sys.executable, __file__, *task, f"--memory={memory}"],
                check=True,
                capture_output=True,
                text=True,
                env=os.environ | {"PACELINE_KERNELS": kernels},
            )
            rounds[name].append(json.loads(done.stdout.rsplit("RESULT ", 1)[1]))
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
    medians = {
        name: {key: round(statistics.median(entry[key] for entry in entries), 1) for key in entries[0]}
        for name, entries in rounds.items()
    }
    for name, figures in medians.items():
        print(f"{name:9} {figures['ms']:7.1f} ms a step, at most {figures['resident_mb']:7.1f} MB")
    result = {f"{name}_ratio": round(medians["torch"]["ms"] / medians[name]["ms"], 3) for name in WAYS}
    record = result | {"medians": medians, "task": vars(options), "machine": machine()}
    (REPOSITORY / "bench" / "results" / "norms.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
