"""The first convolution on a GPU: our kernels beside cuDNN's, by how they are launched.

    python bench/step/stem.py [--filters 16 32 64] [--imgsz 640] [--batch 64] [--processes 14] [--only normed]

Needs a CUDA device; a quarter of a minute where sixteen cores compile. For each number of filters, in bfloat16:
milliseconds of the forward pass (our own cast of the weight in it) and of the gradient of the weight by cuDNN, as its
heuristics and as its own measurement choose, by each launch of ours, and what their bytes take at the bandwidth of a
copy measured here; and of the gradient of the weight by that of what norm and SiLU have made of the result ("normed"),
by each launch of the kernel that makes the gradient between on the way, and of all that is done backward ("all") with
that kernel and with one that writes it. `--only normed` does this alone. Launches are written
groups/filters/warps/stages/programs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import torch
from convolutions import bandwidth, time_of
from torch.nn import functional as F

from paceline.models.operations.fused_norm import normed_and_activated
from paceline.models.operations.fused_stem import BACKWARD, FORWARD, NORMED, Launch, convolved, forwarded, weighed
from paceline.models.operations.handover import Unapplied
from paceline.models.operations.moments import Tally
from paceline.models.operations.pitch import Layout

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DEVICE = torch.device("cuda")
STRIDE = 2


def launch(groups: int, filters: int, warps: int, stages: int, programs: int) -> Launch:
    return Launch(groups=groups, filters=filters, warps=warps, stages=stages, programs=programs)


FORWARD_TRIED = [FORWARD]
FORWARD_TRIED += [launch(64, 32, 4, stages, programs) for stages in (1, 3) for programs in (2112,)]
FORWARD_TRIED += [launch(64, 32, 4, 2, programs) for programs in (528, 8448)]
FORWARD_TRIED += [launch(128, 32, warps, stages, 2112) for warps, stages in ((4, 1), (4, 2), (8, 1), (8, 2))]
BACKWARD_TRIED = [BACKWARD]
BACKWARD_TRIED += [launch(64, 32, 4, stages, 528) for stages in (1, 3)]
BACKWARD_TRIED += [launch(64, 32, 4, 2, programs) for programs in (264, 396, 1056)]
BACKWARD_TRIED += [launch(128, 32, warps, stages, 528) for warps, stages in ((4, 1), (4, 2), (8, 1), (8, 2))]
NORMED_TRIED = [NORMED]
NORMED_TRIED += [launch(64, 16, 4, stages, programs) for stages, programs in ((2, 528), (2, 264), (2, 1584), (3, 396))]
NORMED_TRIED += [launch(64, 16, 8, 2, 264), launch(32, 16, 4, 3, 396), launch(128, 16, 8, 2, 132)]
WIDER = {
    "forward": [launch(64, 64, 8, 1, 2112), launch(64, 64, 8, 2, 2112), launch(64, 16, 4, 2, 4224)],
    "weight": [launch(64, 64, 8, 1, 264), launch(64, 64, 8, 2, 264), launch(64, 16, 4, 2, 1056)],
}
"""Blocks of other widths, for those of whose filters there are more."""


def tried(filters: int) -> dict[str, list[Launch]]:
    """Return the launches of both passes that are worth a try."""
    wider = WIDER if filters > 32 else {"forward": [], "weight": []}
    weight = BACKWARD_TRIED + wider["weight"]
    return {"forward": FORWARD_TRIED + wider["forward"], "weight": weight, "normed": NORMED_TRIED}


def work_of(filters: int, imgsz: int, batch: int) -> tuple[dict[str, Callable[[Launch], Any]], tuple[Tensor, ...]]:
    """Return both passes by a launch, and images, weight and gradient."""
    layout = {"device": DEVICE, "dtype": torch.bfloat16}
    x = torch.rand(batch, imgsz, imgsz, 3, **layout).permute(0, 3, 1, 2)
    weight = torch.randn(filters, 3, 3, 3, device=DEVICE).contiguous(memory_format=torch.channels_last)
    y, of_y = torch.randn(2, batch, imgsz // STRIDE, imgsz // STRIDE, filters, **layout).permute(0, 1, 4, 2, 3)
    kept, affine = torch.rand(2, 2, filters, device=DEVICE)
    norm = {"kept": kept, "weight": affine[0], "bias": affine[1], "of_affine": kept, "silu": True}
    unapplied = Unapplied(of_z=of_y, pitch=filters, y=y, **norm)
    passes: dict[str, Callable[[Launch], Any]] = {
        "forward": lambda chosen: forwarded(x, weight, STRIDE, torch.bfloat16, chosen),
        "weight": lambda chosen: weighed(x, of_y, Layout.of(weight), STRIDE, chosen),
        "normed": lambda chosen: weighed(x, of_y, Layout.of(weight), STRIDE, chosen, unapplied),
    }
    return passes, (x, weight, of_y)


def compiled(numbers: list[int], share: slice, only: list[str]) -> None:
    """Compile a share of all launches, on images of a few pixels."""
    for filters in numbers:
        passes, _ = work_of(filters, 32, 1)
        unlike = {}  # programs are no reason to compile
        for name in only:
            launches = tried(filters)[name]
            unlike |= {
                (name, chosen.groups, chosen.filters, chosen.warps, chosen.stages): chosen for chosen in launches
            }
        for (name, *_), chosen in list(unlike.items())[share]:
            try:
                passes[name](chosen)
            except Exception as error:  # the device has no room for it
                print(f"{name} {vars(chosen)}: {type(error).__name__}", flush=True)


def all_backward(x: Tensor, weight: Tensor, of_z: Tensor, *, hands_over: bool) -> Callable[[], Any]:
    """Return the backward pass of convolution, norm and SiLU."""
    leaf, affine, latest = weight.clone().requires_grad_(), *torch.rand(2, 2, len(weight), device=DEVICE)
    leaves, tally = (leaf, *(value.clone().requires_grad_() for value in affine)), Tally()
    y = convolved(x, leaf, stride=STRIDE, dtype=torch.bfloat16, tally=tally)
    moments = tally.moments if hands_over else None
    (z,) = normed_and_activated(y, *leaves[1:], latest.unbind(), eps=1e-3, silu=True, moments=moments)
    return lambda: torch.autograd.grad(z, leaves, of_z, retain_graph=True)


def times_of(filters: int, imgsz: int, batch: int, per_ms: float, only: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds of both passes, by way."""
    passes, (x, weight, of_y) = work_of(filters, imgsz, batch)
    half = weight.to(torch.bfloat16)
    rest = [STRIDE] * 2, [1, 1], [1, 1], False, [0, 0], 1
    theirs: dict[str, Callable[[], Any]] = {
        "forward": lambda: F.conv2d(x, half, stride=STRIDE, padding=1),
        "weight": lambda: torch.ops.aten.convolution_backward(of_y, x, half, None, *rest, [False, True, False]),
    }
    found = {}
    for name in only:
        launches, maps = tried(filters)[name], 2 if name == "normed" else 1
        times = {"bytes": 2 * (x.numel() + maps * of_y.numel()) / per_ms}
        if name == "normed":
            times["all, written"] = time_of(all_backward(x, weight, of_y, hands_over=False))
            times["all, on the way"] = time_of(all_backward(x, weight, of_y, hands_over=True))
        else:
            for way, measures in (("cudnn", False), ("cudnn measured", True)):
                torch.backends.cudnn.benchmark = measures
                times[way] = time_of(theirs[name])
            torch.backends.cudnn.benchmark = False
        for chosen in launches:
            try:
                way = "/".join(map(str, vars(chosen).values()))
                times[way] = time_of(lambda name=name, chosen=chosen: passes[name](chosen))  # type: ignore[misc]
            except Exception as error:  # the device has no room for it
                print(f"{name} {vars(chosen)}: {type(error).__name__}", flush=True)
        found[name] = times
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filters", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--processes", type=int, default=14)
    parts = ["forward", "weight", "normed"]
    parser.add_argument("--only", nargs="+", default=parts, choices=parts)
    parser.add_argument("--compile", type=int, help="compile each so many-th launch only; for processes of this script")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    if options.compile is not None:
        compiled(options.filters, slice(options.compile, None, options.processes), options.only)
        return 0
    words = [sys.executable, __file__, *sys.argv[1:]]
    others = [subprocess.Popen([*words, "--compile", str(number)]) for number in range(options.processes)]
    for other in others:
        other.wait()
    per_ms = bandwidth()
    figures = {
        filters: times_of(filters, options.imgsz, options.batch, per_ms, options.only) for filters in options.filters
    }
    for filters, found in figures.items():
        for name, times in found.items():
            print(f"{filters} filters, {name}:")
            for way, value in sorted(times.items(), key=lambda item: item[1]):
                print(f"   {value:.4f}  {way}")
    print(
        json.dumps({"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | vars(options) | {"ms": figures})
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
