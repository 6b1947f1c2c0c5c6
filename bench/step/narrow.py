"""3 x 3 convolutions of few channels, or of one channel each, on a GPU: our kernels beside cuDNN's, by launch.

    python bench/step/narrow.py [--models yolo11n yolo11s] [--imgsz 640] [--batch 64] [--processes 12]

Needs a CUDA device. For each unlike depthwise convolution, and each other with at most 64 channels on either side, in
bfloat16: milliseconds of the forward pass with moments, the gradient of the map and the gradient of the weights; first
all kernels are compiled in several processes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from convolutions import convolutions_of, time_of
from torch.nn import functional as F

from paceline.models.operations import depthwise_conv
from paceline.models.operations.moments import Tally
from paceline.models.operations.narrow_conv import Cells, Launch, _convolved, _traced_back, _weighed

if TYPE_CHECKING:
    from collections.abc import Callable

DEVICE = torch.device("cuda")
MOST = 64
CONVOLVING_TRIED: list[Launch | Cells] = [
    Launch(64, warps, stages, programs) for warps, stages, programs in product((4, 8), (1, 3), (264, 396, 528))
]
CONVOLVING_TRIED += [Cells(lines, 8, warps, stages) for (lines, warps), stages in product(((16, 4), (8, 4)), (2, 3))]
WEIGHING_TRIED = [Launch(64, warps, stages, count) for warps, stages, count in product((4, 8), (2, 3), (132, 264))]
TRACING_TRIED = [launch for launch in CONVOLVING_TRIED if isinstance(launch, Launch)]
EACH_TRIED = [
    depthwise_conv.Launch(tile, columns, warps)
    for (tile, warps), columns in product(((2048, 4), (1024, 4), (1024, 2), (512, 2)), (4, 8))
]


def once(key: tuple[int, ...], launch: Launch | Cells | depthwise_conv.Launch, passes: str) -> None:
    """Compile what a launch needs."""
    channels, out_channels, _, stride, *_ = key
    if isinstance(launch, depthwise_conv.Launch):
        x = torch.zeros(1, 16, 16, channels, device=DEVICE, dtype=torch.bfloat16).permute(0, 3, 1, 2)
        filters = torch.zeros(9, channels, device=DEVICE, dtype=torch.bfloat16)
        depthwise_conv.traced_back(x, filters, launch)
        return
    layout = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.zeros(1, 16, 16, channels, **layout).permute(0, 3, 1, 2)
    weight = torch.zeros(out_channels, 3, 3, channels, **layout).permute(0, 3, 1, 2)
    y = torch.zeros(1, 16 // stride, 16 // stride, out_channels, **layout).permute(0, 3, 1, 2)
    if passes == "weights":
        _weighed(x, y, stride, launch)
    else:
        _convolved(x, weight, stride, launch, tally=Tally())
        if stride == 1:
            _convolved(y, weight, 1, launch, turned=True)
        elif isinstance(launch, Launch):
            _traced_back(y, weight, (16, 16), launch)


def tried(work: Callable[[Any], Any], launches: list[Any]) -> dict[str, float]:
    """Milliseconds by launch; nothing of those that the device has no room for."""
    found = {}
    for launch in launches:
        try:
            found["/".join(map(str, vars(launch).values()))] = time_of(lambda launch=launch: work(launch))
        except Exception as error:  # out of shared memory, with some channels
            print(f"   {launch}: {type(error).__name__}", flush=True)
    return found


def times_of(key: tuple[int, ...], batch: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Milliseconds of each pass by cuDNN, and by each launch of ours."""
    channels, out_channels, _, stride, groups, height, width = key
    layout = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.randn(batch, height, width, channels, **layout).permute(0, 3, 1, 2)
    weight = torch.randn(out_channels, 3, 3, channels // groups, **layout).permute(0, 3, 1, 2)
    of_y = torch.randn_like(F.conv2d(x, weight, stride=stride, padding=1, groups=groups))
    rest = [stride] * 2, [1, 1], [1, 1], False, [0, 0], groups

    def backward(*mask: bool) -> Callable[[], Any]:
        return lambda: torch.ops.aten.convolution_backward(of_y, x, weight, None, *rest, list(mask))

    theirs = {"forward": time_of(lambda: F.conv2d(x, weight, stride=stride, padding=1, groups=groups))}
    theirs["weights"] = time_of(backward(False, True, False))
    if groups > 1:
        filters = weight.view(-1, 9).T.contiguous()
        theirs["map"] = time_of(backward(True, False, False))
        return theirs, {"map": tried(lambda launch: depthwise_conv.traced_back(of_y, filters, launch), EACH_TRIED)}
    ours = {"forward": tried(lambda launch: _convolved(x, weight, stride, launch, tally=Tally()), CONVOLVING_TRIED)}
    if channels > 3:
        theirs["map"] = time_of(backward(True, False, False))
        if stride == 1:
            ours["map"] = tried(lambda launch: _convolved(of_y, weight, 1, launch, turned=True), CONVOLVING_TRIED)
        else:
            ours["map"] = tried(lambda launch: _traced_back(of_y, weight, (height, width), launch), TRACING_TRIED)
    ours["weights"] = tried(lambda launch: _weighed(x, of_y, stride, launch), WEIGHING_TRIED)
    return theirs, ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["yolo11n", "yolo11s"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--compile", type=int, help="compile each so many-th way only; for processes of this script")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    keys: dict[tuple[int, ...], int] = {}
    for model in options.models:
        for key in convolutions_of(model, options.imgsz, options.batch):
            if key[2] == 3 and (key[4] > 1 or max(key[:2]) <= MOST):
                keys[key] = len(keys)
    if options.compile is not None:
        alone = {key[0]: key for key in keys if key[4] > 1}  # of which the size is not compiled in
        joined = {key[:4]: key for key in keys if key[4] == 1}
        work: list[tuple[Any, ...]] = [(key, launch, "each") for key in alone.values() for launch in EACH_TRIED]
        work += [(key, launch, "maps") for key in joined.values() for launch in CONVOLVING_TRIED]
        work += [(key, launch, "weights") for key in joined.values() for launch in WEIGHING_TRIED]
        for entry in work[options.compile :: options.processes]:
            try:
                once(*entry)
            except Exception as error:
                print(entry, type(error).__name__, flush=True)
        return 0
    words = [sys.executable, __file__, *sys.argv[1:]]
    others = [subprocess.Popen([*words, "--compile", str(number)]) for number in range(options.processes)]
    for other in others:
        other.wait()
    figures = []
    for key in keys:
        theirs, ours = times_of(key, options.batch)
        print(key, flush=True)
        for name, times in ours.items():
            cells = "  ".join(f"{way} {value:.4f}" for way, value in sorted(times.items(), key=lambda item: item[1]))
            print(f"   {name:8} theirs {theirs[name]:.4f}  {cells}", flush=True)
        figures.append({"convolution": key, "theirs": theirs, "ours": ours})
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "figures": figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
