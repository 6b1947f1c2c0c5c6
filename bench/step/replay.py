"""One replay of a step's graph on a GPU: every kernel with its start, length and stream, and when the main chain waits.

    python bench/step/replay.py --out FILE [--model yolo11n] [--imgsz 640] [--batch 64]
    python bench/step/replay.py --read FILE

The first needs a CUDA device and takes about half a minute; FILE then holds a list of name, microseconds from the first
kernel, microseconds it took, stream, grid and block, of three replays. What runs beside others counts the time of all.
The second reads such a file anywhere. Both print of the second replay how long it took, how long nothing ran, how long
the backward pass ran nothing or gradients of weights alone (which kernels are theirs goes by name, but for the stem's),
and each kernel's sum. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

REPLAYS = 3
OF_WEIGHTS = ("wgrad", "_weight_parts", "_weight_gradient", "_settle_weight", "_end_parts", "splitK", "init_device")
OF_WEIGHTS += ("Kernel2<cutlass_80", "_convert")
"""Parts of names of kernels that sum gradients of weights, or do something with these alone."""
FIRST_BACKWARD = ("_class_gradient", "_fill_gradients")
LEAST_WAIT_US = 4.0
"""Shorter ones lie between any two kernels."""

Event = tuple[str, float, float, int, Any, Any]


def recorded(model: str, imgsz: int, batch: int) -> list[Event]:
    """Record a step, replay it, and return what the device did."""
    from kernels import RATES, compile_kernels, drawn, setting_of, timed
    from paceline.training.graphed import CudaCapture, graphed
    from paceline.training.precision import Precision
    from paceline.training.understudy import understudy

    device = torch.device("cuda")
    setting = setting_of(model, imgsz, device)
    compile_kernels(setting)
    step = graphed(understudy(setting.cast, Precision.named("bf16")), CudaCapture(device))
    print(f"{model}: {timed(step, setting, batch, 20)}", flush=True)
    images = drawn(batch, setting)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            step(images, RATES, completes=True)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    of_device = [event for event in events if event.get("cat", "").startswith(("kernel", "gpu_mem"))]
    of_device.sort(key=lambda event: event["ts"])
    first = of_device[0]["ts"]
    return [
        (
            event["name"][:140],
            round(event["ts"] - first, 2),
            round(event["dur"], 2),
            event["args"].get("stream"),
            event["args"].get("grid"),
            event["args"].get("block"),
        )
        for event in of_device
    ]


def idle_us(events: list[Event], least_us: float = 0.0) -> float:
    """Add up the time between the first and the last of these in which none of them ran."""
    spans = sorted((start, start + length) for _, start, length, *_ in events)
    idle, end = 0.0, spans[0][1]
    for start, stop in spans[1:]:
        idle += start - end if start - end > least_us else 0.0
        end = max(end, stop)
    return idle


def told(events: list[Event]) -> dict[str, Any]:
    """Say of the second of the replays what took how long."""
    count = len(events) // REPLAYS
    events = events[count : 2 * count]
    begin = next((start for name, start, *_ in events if name.startswith(FIRST_BACKWARD)), events[0][1])
    chain = [event for event in events if event[1] > begin and not any(part in event[0] for part in OF_WEIGHTS)]
    sums: dict[str, float] = defaultdict(float)
    for name, _, length, *_ in events:
        sums[name] += length
    return {
        "span_us": max(start + length for _, start, length, *_ in events) - events[0][1],
        "nothing_runs_us": idle_us(events),
        "weights_alone_us": idle_us(chain, LEAST_WAIT_US),
        "sums_us": {name: round(sums[name], 1) for name in sorted(sums, key=lambda name: -sums[name])},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="what is recorded goes there")
    parser.add_argument("--read", type=Path, help="what was recorded before")
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if (options.out is None) == (options.read is None):
        parser.error("say --out to record, or --read")
    if options.read:
        events = [tuple(event) for event in json.loads(options.read.read_text(encoding="utf-8"))]
    elif torch.cuda.is_available():
        events = recorded(options.model, options.imgsz, options.batch)
        options.out.write_text(json.dumps(events), encoding="utf-8")
    else:
        print("To record, this bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    figures = told(events)
    for name, took in figures["sums_us"].items():
        print(f"{took:9.1f} us  {name}")
    print(json.dumps({name: value for name, value in figures.items() if name != "sums_us"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
