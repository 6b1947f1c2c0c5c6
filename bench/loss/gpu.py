"""The detection loss on a GPU, forward and backward: by kernels and by PyTorch's operations.

    python bench/loss/gpu.py [--batch 64] [--imgsz 640] [--boxes 32] [--classes 80] [--dtype bfloat16]

Takes under a minute. Prints the times of both ways, eager and as a graph, what each kernel takes, and the figures as
JSON in the last line. Without a GPU it ends with exit code 2. A fifth of the padded boxes are real, on average.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from paceline.batch import Batch
from paceline.boxes import anchor_points
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

NUM_STEPS = 30


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--boxes", type=int, default=32)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parser.parse_args()
    device = torch.device("cuda")
    if not torch.cuda.is_available() or not usable(device):
        print("This bench needs a CUDA GPU and Triton.", file=sys.stderr)
        return 2
    raw, logits, batch = make_outputs(options, device)
    criterion = DetectionLoss(LossConfig(), options.classes)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(criterion((raw, logits), batch).total, (raw, logits))

    figures: dict[str, float | str] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **vars(options)}
    ways = {"kernels": usable, "operations": lambda device: False}
    for name, answer in ways.items():
        with patch("paceline.losses.detection.usable", answer):
            figures[f"{name}_eager_ms"] = median_ms(step)
            figures[f"{name}_graph_ms"] = median_ms(recorded(step))
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            figures[f"{name}_peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
            with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as trace:
                step()
                torch.cuda.synchronize()
            print(name)
            print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=12, max_name_column_width=48))
    print(json.dumps(figures))
    return 0


def make_outputs(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, Batch]:
    """Raw outputs as of a network that has learnt something, and a batch of boxes."""
    torch.manual_seed(0)
    size_hw, dtype = (options.imgsz, options.imgsz), getattr(torch, options.dtype)
    num_points = len(anchor_points(size_hw)[0])
    raw = torch.randn(options.batch, num_points, 64, device=device).to(dtype).requires_grad_()
    logits = (torch.randn(options.batch, num_points, options.classes, device=device) - 6).to(dtype).requires_grad_()
    centre = options.imgsz * torch.rand(options.batch, options.boxes, 2, device=device)
    half = 4 + options.imgsz / 5 * torch.rand(options.batch, options.boxes, 2, device=device)
    batch = Batch(
        images=torch.zeros(options.batch, 3, *size_hw, dtype=torch.uint8, device=device),
        boxes=torch.cat((centre - half, centre + half), dim=-1).clamp(0, options.imgsz),
        labels=torch.randint(options.classes, (options.batch, options.boxes), device=device),
        valid=torch.rand(options.batch, options.boxes, device=device) < 0.2,
        samples=torch.arange(options.batch, device=device),
        original_hw=torch.tensor([size_hw] * options.batch, device=device),
    )
    return raw, logits, batch


def recorded(step: Callable[[], object]) -> Callable[[], None]:
    """Record a step as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def median_ms(step: Callable[[], object]) -> float:
    """Median time of a step on the device, each between two events, started without a pause."""
    for _ in range(5):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(NUM_STEPS)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return round(statistics.median(start.elapsed_time(end) for start, end in events), 3)


if __name__ == "__main__":
    sys.exit(main())
