"""A step of one network on a GPU: eager and as a graph, with and without our kernels, and where its time goes.

    python bench/step/kernels.py [--model yolo11n] [--imgsz 640] [--batch 64] [--steps 20] [--top 40]

Needs a CUDA device; takes about half a minute for each network. Milliseconds are those of steps in a row, on one batch
of noise with 16 boxes per image; the kernels are those of a graph. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.training.config import OptimConfig
from paceline.training.graphed import CudaCapture, graphed
from paceline.training.optim import plan_optimizer
from paceline.training.precision import Precision
from paceline.training.schedule import Rates
from paceline.training.trials import TrialSetting, noise
from paceline.training.understudy import Cast, understudy

if TYPE_CHECKING:
    from paceline.training.step import Step

CLASSES, BOXES, ROOM = 80, 16, 32
WARM_UPS = 4
RATES = Rates(lr=1e-6, bias_lr=1e-6, momentum=0.9)


def setting_of(model: str, imgsz: int, device: torch.device) -> TrialSetting:
    """Put together what a long training by SGD would have."""
    torch.manual_seed(0)
    cast = Cast(
        network=build_model(model, CLASSES).to(device),
        criterion=DetectionLoss(LossConfig(), CLASSES),
        optimizer=plan_optimizer(OptimConfig(optimizer="SGD"), num_classes=CLASSES, updates=20_000, effective_batch=64),
        freeze=0,
        clip=10.0,
    )
    return TrialSetting(cast=cast, device=device, imgsz=imgsz, boxes=BOXES, padded_boxes=ROOM)


def timed(step: Step, setting: TrialSetting, images: int, steps: int) -> dict[str, float]:
    """Time steps in a row, after some that warm up."""
    batch = noise(images, setting)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UPS):
        step(batch, RATES, completes=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step(batch, RATES, completes=True)
    host_s = time.perf_counter() - start
    torch.cuda.synchronize()
    whole_s = time.perf_counter() - start
    return {
        "ms": 1e3 * whole_s / steps,
        "host_ms": 1e3 * host_s / steps,
        "images_per_s": images * steps / whole_s,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def kernels_of(step: Step, setting: TrialSetting, images: int, steps: int = 3) -> list[tuple[str, float, float]]:
    """Name every kernel with its milliseconds and launches per step, the most expensive first."""
    batch = noise(images, setting)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(steps):
            step(batch, RATES, completes=True)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.device_time / 1e3
            launches[event.name] += 1
    names = sorted(times, key=lambda name: -times[name])
    return [(name, times[name] / steps, launches[name] / steps) for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top", type=int, default=40, help="kernels that are listed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | vars(options)
    for ours in (False, True):
        for graphs in (False, True):
            name = f"{'our kernels' if ours else 'torch alone'}, {'graph' if graphs else 'eager'}"
            setting = setting_of(options.model, options.imgsz, device)
            with ExitStack() as stack:
                if not ours:
                    for room in (
                        "parallel.norms",
                        "losses.detection",
                        "models.convolution",
                        "models.stem",
                        "triton_kernels",
                    ):
                        stack.enter_context(mock.patch(f"paceline.{room}.usable", return_value=False))
                eager = understudy(setting.cast, Precision.named("bf16"))
                step = graphed(eager, CudaCapture(device)) if graphs else eager
                figures[name] = timed(step, setting, options.batch, options.steps)
                cells = ", ".join(f"{key} {value:,.2f}" for key, value in figures[name].items())
                print(f"{options.model} {name}: {cells}", flush=True)
                if graphs:
                    found = kernels_of(step, setting, options.batch)
                    figures[name]["kernels"] = sum(count for _, _, count in found)
                    for kernel, ms, count in found[: options.top]:
                        print(f"{ms:9.3f} ms {count:6.1f} x  {kernel[:150]}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
