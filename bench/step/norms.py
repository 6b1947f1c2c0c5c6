"""The norm kernels of one network on a GPU, by how they are launched.

    python bench/step/norms.py [--model yolo11n] [--imgsz 640] [--batch 64] [--processes 12]

Needs a CUDA device. Milliseconds of each kernel, summed over all norms of the network, forward and backward, as the
profiler tells, for several sizes of tiles, warps and loads under way; first all are compiled in several processes. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import product

import torch
from torch import nn

from paceline.models.operations.fused_norm import RESULTS, SUMS, Launch, normed_and_activated
from paceline.models.registry import build_model

DEVICE = torch.device("cuda")
KERNELS = ("_statistics", "_settle_statistics", "_apply", "_gradient_sums", "_settle_sums", "_apply_gradient")
SUMS_TRIED = [
    Launch(tile=tile, warps=warps, stages=stages, programs=programs)
    for tile, warps, stages, programs in [
        *product((1024, 2048), (4,), (1, 3, 4, 6), (1024,)),
        *product((1024,), (2,), (3, 5), (1024, 2048)),
        (2048, 4, 4, 512),
        (4096, 8, 4, 512),
    ]
]
RESULTS_TRIED = [Launch(tile=tile, warps=warps) for tile, warps in product((512, 1024, 2048), (1, 2, 4))]


def shapes_of(model: str, imgsz: int, batch: int) -> Counter[tuple[int, int, int, int]]:
    """Count the maps that are normalised, by shape."""
    found: Counter[tuple[int, int, int, int]] = Counter()
    network = build_model(model, 80).to("meta")
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, inputs, __: found.update([tuple(inputs[0].shape)]))
    network(torch.empty(batch, 3, imgsz, imgsz, device="meta"))
    return found


def once(shape: tuple[int, ...], of_sums: Launch, of_results: Launch) -> None:
    """Normalise a map, forward and backward."""
    channels = shape[1]
    y = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    affine = [torch.rand(channels, device=DEVICE, requires_grad=True) for _ in range(2)]
    latest = (torch.empty(channels, device=DEVICE), torch.empty(channels, device=DEVICE))
    launches = {"of_sums": of_sums, "of_results": of_results}
    (z,) = normed_and_activated(y.requires_grad_(), *affine, latest, eps=1e-3, silu=True, **launches)
    z.backward(torch.randn_like(z))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--compile", type=int, help="compile each so many-th way only; for processes of this script")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    ways = [(of_sums, RESULTS) for of_sums in SUMS_TRIED] + [(SUMS, of_results) for of_results in RESULTS_TRIED]
    shapes = shapes_of(options.model, options.imgsz, options.batch)
    if options.compile is not None:
        for way in ways[options.compile :: options.processes]:
            for channels in {shape[1] for shape in shapes}:
                once((1, channels, 8, 16), *way)
        return 0
    words = [sys.executable, __file__, *sys.argv[1:]]
    others = [subprocess.Popen([*words, "--compile", str(number)]) for number in range(options.processes)]
    for other in others:
        other.wait()
    figures = []
    for way in ways:
        for shape in shapes:
            once(shape, *way)
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            for shape in shapes:
                for _ in range(2):
                    once(shape, *way)
            torch.cuda.synchronize()
        times: dict[str, float] = defaultdict(float)
        seen: Counter[str] = Counter()
        events = sorted(profile.events(), key=lambda event: event.time_range.start)
        counts = [shapes[shape] / 2 for shape in shapes for _ in range(2)]
        for event in events:
            if event.name in KERNELS:
                times[event.name] += event.device_time / 1e3 * counts[seen[event.name]]
                seen[event.name] += 1
        of_sums, of_results = way
        print(f"sums {of_sums}, results {of_results}:", flush=True)
        print("   " + "  ".join(f"{name} {times[name]:.3f}" for name in KERNELS), flush=True)
        figures.append({"sums": vars(of_sums), "results": vars(of_results), "ms": dict(times)})
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "ways": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
