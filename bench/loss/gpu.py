"""The detection loss on a GPU, forward and backward: by kernels, each of them alone too, and by PyTorch's operations.

    python bench/loss/gpu.py [--batch 64] [--imgsz 640] [--dtype bfloat16] [--budget 25]

Takes at most the budget in seconds. For 80 classes with 16 boxes padded to 32, for 3 classes with as many, and for 80
with 200 boxes: the time of the loss as a graph, and of each kernel as a graph of 20 launches of it, beside the bytes
that it has to move and what those alone would take at the speed of a copy. Then kernels with other launch settings, as
far as the budget goes. The last line holds all figures as JSON. Without a GPU it ends with exit code 2.

A kernel that is launched again finds in the cache what fits there, so small ones look faster than they are in a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch

from paceline.batch import Batch
from paceline.boxes import anchor_points
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.triton_kernels import compiled_ahead, usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NUM_LAUNCHES, NUM_REPLAYS, NUM_STEPS, NUM_THREADS = 20, 5, 20, 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a network and a batch look like."""

    num_classes: int
    num_boxes: int
    num_padded: int


CASES = {
    "80 classes, 16 boxes": Case(num_classes=80, num_boxes=16, num_padded=32),
    "3 classes, 16 boxes": Case(num_classes=3, num_boxes=16, num_padded=32),
    "80 classes, 200 boxes": Case(num_classes=80, num_boxes=200, num_padded=200),
}
SETTINGS: tuple[tuple[str, str, Any], ...] = (
    *(("_claim", "_CLAIMED", {"block": block, "num_warps": 4}) for block in (128, 512, 1024)),
    *(("_claim", "_CLAIMED", {"block": block, "num_warps": warps}) for block, warps in ((128, 2), (256, 2), (512, 8))),
    *(("_claim", "_PIECES", pieces) for pieces in (1, 2, 8)),
    ("_claim", "_MANY_BOXES", 2**30),
    *(("_decode", "_DECODED", {"block": block}) for block in (128, 256, 1024)),
    *(
        ("_sum_softplus", "_SUMMED", {"block": block, "steps": steps, "num_warps": warps})
        for block, steps, warps in ((1024, 8, 4), (1024, 4, 4), (512, 8, 2), (1024, 16, 4))
    ),
    *(
        ("_fill_gradients", "_FILLED", {"block": block, "steps": steps, "num_warps": warps})
        for block, steps, warps in ((1024, 1, 4), (1024, 2, 4), (2048, 4, 8), (2048, 1, 4), (1024, 8, 4))
    ),
    *(
        ("_slot_gradients", "_ROWS", {"block": block, "num_warps": warps})
        for block, warps in ((16, 2), (32, 2), (64, 4))
    ),
    *(("_pick", "_PICKED", {"block": block, "num_warps": 1}) for block in (1, 4, 8)),
)
"""Other launch settings of `fused`: kernel, name of the setting, value."""


def main() -> int:
    begin = time.perf_counter()
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--budget", type=float, default=25.0)
    options = parser.parse_args()
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not usable(device):
        print("This bench needs a CUDA GPU and Triton.", file=sys.stderr)
        return 2
    compile_all(options)
    print(f"compiled after {time.perf_counter() - begin:.1f} s")
    bytes_per_us = copy_speed(device)
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(options)}
    figures["copy_gb_per_s"] = round(bytes_per_us / 1e3)
    for name, case in CASES.items():
        raw, logits, batch = make_outputs(options, case, device)
        step = step_of(raw, logits, batch)
        found = figures[name] = {"graph_us": graph_us(step)}
        needed = needed_bytes(raw, logits)
        print(f"{name}: {found['graph_us']:.1f} us as a graph")
        for kernel, launch in launches(step).items():
            alone = round(repeated_us(launch), 2)
            bound = needed.get(kernel, 0) / bytes_per_us
            found[kernel] = {"us": alone, "bytes_us": round(bound, 2)}
            print(f"    {kernel:18s}{alone:9.2f} us, its bytes {bound:7.2f} us")
        print(f"    {'all, one by one':18s}{sum(found[kernel]['us'] for kernel in found if kernel[0] == '_'):9.2f} us")
        if name == next(iter(CASES)):
            with patch("paceline.losses.detection.usable", lambda device: False):
                figures["operations_ms"] = round(graph_us(step) / 1e3, 3)
            print(f"    by PyTorch's operations {figures['operations_ms']} ms")
    figures["settings"] = try_settings(options, begin + options.budget - 2)
    print(json.dumps(figures))
    return 0


def make_outputs(options: argparse.Namespace, case: Case, device: torch.device) -> tuple[Tensor, Tensor, Batch]:
    """Raw outputs as of a network that has learnt something, and a batch of boxes."""
    torch.manual_seed(0)
    size_hw, dtype = (options.imgsz, options.imgsz), getattr(torch, options.dtype)
    num_points = len(anchor_points(size_hw)[0])
    raw = torch.randn(options.batch, num_points, 64, device=device).to(dtype).requires_grad_()
    logits = (torch.randn(options.batch, num_points, case.num_classes, device=device) - 6).to(dtype).requires_grad_()
    centre = options.imgsz * torch.rand(options.batch, case.num_padded, 2, device=device)
    half = 4 + options.imgsz / 5 * torch.rand(options.batch, case.num_padded, 2, device=device)
    batch = Batch(
        images=torch.zeros(options.batch, 3, *size_hw, dtype=torch.uint8, device=device),
        boxes=torch.cat((centre - half, centre + half), dim=-1).clamp(0, options.imgsz),
        labels=torch.randint(case.num_classes, (options.batch, case.num_padded), device=device),
        valid=(torch.arange(case.num_padded, device=device) < case.num_boxes).expand(options.batch, -1).contiguous(),
        samples=torch.arange(options.batch, device=device),
        original_hw=torch.zeros(options.batch, 2, dtype=torch.int64, device=device),
    )
    return raw, logits, batch


def step_of(raw: Tensor, logits: Tensor, batch: Batch) -> Callable[[], tuple[Tensor, ...]]:
    """Return what computes the loss and its gradients."""
    criterion = DetectionLoss(LossConfig(), logits.shape[-1])
    criterion._anchors(batch.size_hw, raw.device, torch.float32)
    return lambda: torch.autograd.grad(criterion((raw, logits), batch).total, (raw, logits))


def compile_all(options: argparse.Namespace) -> None:
    """Compile what will be launched, in threads."""
    with compiled_ahead(NUM_THREADS):
        for case in CASES.values():
            step_of(*make_outputs(options, case, torch.device("meta")))()
        step = step_of(*make_outputs(options, CASES["80 classes, 16 boxes"], torch.device("meta")))
        for _, name, value in SETTINGS:
            with patch(f"paceline.losses.fused.{name}", value):
                step()


def needed_bytes(raw: Tensor, logits: Tensor) -> dict[str, int]:
    """Return what each kernel that goes over all points reads and writes at least."""
    points = raw.shape[0] * raw.shape[1]
    of_raw, of_logits = (tensor.numel() * tensor.element_size() for tensor in (raw, logits))
    return {
        "_decode": of_raw + 32 * points,
        "_sum_softplus": of_logits,
        "_fill_gradients": of_raw + 2 * of_logits,
    }


def launches(step: Callable[[], object]) -> dict[str, Callable[[], None]]:
    """Take a step, and return what launches each of its kernels again."""
    from paceline.losses import fused

    start, found = fused.start_kernel, {}

    def noted(kernel: Any, grid: tuple[int, ...], *given: Any, **settings: Any) -> None:
        found[kernel.fn.__name__] = lambda: start(kernel, grid, *given, **settings)
        start(kernel, grid, *given, **settings)

    with patch.object(fused, "start_kernel", noted):
        step()
    return found


def try_settings(options: argparse.Namespace, end: float) -> list[dict[str, Any]]:
    """Time kernels with other settings until it is late; the first case is what counts, and the last may differ."""
    found: list[dict[str, Any]] = []
    cases = {name: CASES[name] for name in ("80 classes, 16 boxes", "80 classes, 200 boxes")}
    steps = {name: step_of(*make_outputs(options, case, torch.device("cuda"))) for name, case in cases.items()}
    for kernel, name, value in SETTINGS:
        times = {}
        for case, step in steps.items():
            if time.perf_counter() > end:
                print("the rest of the settings: no time left")
                return found
            with ExitStack() as stack:
                stack.enter_context(patch(f"paceline.losses.fused.{name}", value))
                times[case] = round(repeated_us(launches(step)[kernel]), 2)
        found.append({"kernel": kernel, name: value, "us": times})
        print(f"{kernel} with {name} {value}: {times}")
    return found


def recorded(step: Callable[[], object], times: int) -> torch.cuda.CUDAGraph:
    """Record a step so many times as one graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            step()
    return graph


def repeated_us(launch: Callable[[], object]) -> float:
    """Time of a launch among its like."""
    return median_us(recorded(launch, NUM_LAUNCHES).replay, NUM_REPLAYS) / NUM_LAUNCHES


def graph_us(step: Callable[[], object]) -> float:
    """Time of a step that is a graph."""
    return round(median_us(recorded(step, 1).replay, NUM_STEPS), 1)


def copy_speed(device: torch.device) -> float:
    """Bytes per microsecond that a copy of 256 MB reads and writes."""
    source, target = torch.zeros(2, 2**28, dtype=torch.uint8, device=device)
    return 2 * source.numel() / repeated_us(lambda: target.copy_(source))


def median_us(step: Callable[[], object], count: int) -> float:
    """Median time of a step on the device, each between two events, started without a pause."""
    for _ in range(2):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


if __name__ == "__main__":
    sys.exit(main())
