"""The convolutions of one network on a GPU, each alone: forward, gradient of the map, gradient of the weights.

    python bench/step/convolutions.py [--model yolo11n] [--imgsz 640] [--batch 64]

Needs a CUDA device. For each unlike convolution, in bfloat16 and channels-last: how often it is there, milliseconds of
all of them as cuDNN's heuristics choose, as its own measurement chooses (`cudnn.benchmark`), as products of matrices
where the kernel is 1 x 1, and what their bytes take at the bandwidth of a copy measured here. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from paceline.models.registry import build_model

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda")
CALLS, ROUNDS = 5, 5


def time_of(work: Callable[[], Any], *, calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Milliseconds of one call: the median of rounds of a graph of several."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        work()
        work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            work()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per millisecond that a large copy moves."""
    source = torch.randn(2**28, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / time_of(lambda: target.copy_(source))


def convolutions_of(model: str, imgsz: int, batch: int) -> Counter[tuple[int, ...]]:
    """Count the convolutions by (in, out, kernel, stride, groups, height, width)."""
    found: Counter[tuple[int, ...]] = Counter()

    def note(module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        _, channels, height, width = inputs[0].shape
        key = (channels, module.out_channels, module.kernel_size[0], module.stride[0], module.groups, height, width)
        found[key] += 1

    network = build_model(model, 80).to("meta")
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(note)  # type: ignore[arg-type]
    network(torch.empty(batch, 3, imgsz, imgsz, device="meta"))
    return found


def times_of(key: tuple[int, ...], batch: int, per_ms: float) -> dict[str, list[float]]:
    """Milliseconds of the three passes by each way, and of their bytes."""
    channels, out_channels, kernel, stride, groups, height, width = key
    layout = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(batch, channels, height, width, **layout).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out_channels, channels // groups, kernel, kernel, **layout)
    weight = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=groups)
    gradient = torch.randn_like(y)
    rest = [stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], groups

    def backward(*mask: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(gradient, x, weight, None, *rest, list(mask))

    needs_gradient = height != width or channels != 3
    found = {}
    for way, measures in (("chosen", False), ("measured", True)):
        torch.backends.cudnn.benchmark = measures
        found[way] = [
            time_of(lambda: F.conv2d(x, weight, stride=stride, padding=kernel // 2, groups=groups)),
            time_of(backward(True, False, False)) if needs_gradient else 0.0,
            time_of(backward(False, True, False)),
        ]
    torch.backends.cudnn.benchmark = False
    if kernel == 1:
        rows, rows_of_y = x.permute(0, 2, 3, 1).reshape(-1, channels), gradient.permute(0, 2, 3, 1).flatten(0, 2)
        matrix = weight.flatten(1)
        found["matrices"] = [
            time_of(lambda: rows @ matrix.T),
            time_of(lambda: rows_of_y @ matrix),
            time_of(lambda: rows_of_y.T @ rows),
        ]
    maps = 2 * (x.numel() + y.numel()) / per_ms
    found["bytes"] = [maps, maps if needs_gradient else 0.0, maps]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    per_ms = bandwidth()
    sums: dict[str, float] = Counter()
    rows = []
    for key, count in convolutions_of(options.model, options.imgsz, options.batch).items():
        found = times_of(key, options.batch, per_ms)
        rows.append((count * sum(found["chosen"]), key, count, found))
        for way, times in found.items():
            sums[way] += count * sum(times)
        sums["best"] += count * sum(map(min, zip(*(found[way] for way in found if way != "bytes"), strict=True)))
    print("in, out, kernel, stride, groups, height, width: count; ms of all: forward, map, weights by each way")
    for _, key, count, found in sorted(rows, key=lambda row: -row[0]):
        cells = "  ".join(
            f"{way} " + " ".join(f"{count * value:6.3f}" for value in times) for way, times in found.items()
        )
        print(f"{key!s:36} x{count}  {cells}", flush=True)
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | vars(options) | dict(sums)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
