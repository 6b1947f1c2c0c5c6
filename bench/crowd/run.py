"""Steps on a CPU with one thread and with all, alone and beside programs that want every core; last line JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.single import SingleEngine
from paceline.planning.noise import noise_batch

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine  # noqa: E402


def step_of() -> Callable[[], float]:
    """Make what takes one step of yolo11n (320 px, batch 16, bf16) and says how many seconds it took."""
    torch.manual_seed(0)
    network = build_model("yolo11n", 3).to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    criterion = DetectionLoss(LossConfig(), num_classes=3)
    engine = SingleEngine(network, criterion, amp_dtype=torch.bfloat16, clip=10.0, ledger=Ledger())
    batch = noise_batch(16, 320, 3, dtype=None, device=torch.device("cpu"))

    def step() -> float:
        start = time.perf_counter()
        engine.accumulate(batch)
        engine.gradient()
        network.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    step, result = step_of(), {}
    for others in (0, 1, cores):
        programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(others)]
        try:
            for threads in (1, cores):
                torch.set_num_threads(threads)
                step()  # operations prepare for this number
                times = [step() for _ in range(options.steps)]
                result[f"threads_{threads}_beside_{others}_s"] = round(statistics.median(times), 3)
                print(
                    f"{threads} threads beside {others} programs: {statistics.median(times):.2f} s a step", flush=True
                )
        finally:
            for program in programs:
                program.kill()
                program.wait()
    record = result | {"steps": options.steps, "machine": machine()}
    (REPOSITORY / "bench" / "results" / "crowd.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
