"""A step of one network on a GPU: eager and as a graph, with and without our kernels, and where its time goes.

    python bench/step/kernels.py [--model yolo11n] [--imgsz 640] [--batch 64] [--steps 20] [--top 40]
                                 [--only-ours | --compare halves|lists|moments|streams|branches|ends|sums ...]

Needs a CUDA device; takes about half a minute for each network, once its kernels are compiled. Milliseconds are those
of steps in a row, on one batch of noise as a device draws it, with 16 boxes per image; the kernels, and the time
between them, are those of a graph on one stream: kernels side by side would each count the time of all.

With `--compare` there are graphs with our kernels alone, with something and without it, in turn and twice: `halves`,
weights rounded by nodes (decision 76); `lists`, whole lists of tensors by one kernel (decision 82); `moments`, norms
that take the moments that convolutions have written (decision 70); `streams`, gradients of weights and branches of the
head on streams of their own (decision 83); `branches`, these of the head alone; `ends`, last convolutions of the head
that write where their points are joined (decision 86); `sums`, gradients that norms add up (decision 85). The last line
is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.registry import build_model
from paceline.parallel.norms import BatchNorm
from paceline.training.ahead import imagined_step
from paceline.training.config import OptimConfig
from paceline.training.graphed import CudaCapture, graphed
from paceline.training.optim import plan_optimizer
from paceline.training.precision import Precision
from paceline.training.schedule import Rates
from paceline.training.trials import TrialSetting, noise
from paceline.training.understudy import Cast, understudy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from paceline.batch import Batch
    from paceline.training.step import Step

CLASSES, BOXES, ROOM = 80, 16, 32
WARM_UPS = 4
OF_MODELS = ("models.convolution", "models.stem", "models.joint")
ROOMS = ("parallel.norms", "losses.detection", *OF_MODELS, "lists", "triton_kernels")
"""Where it is asked whether kernels can be used."""
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


def drawn(images: int, setting: TrialSetting) -> Batch:
    """Make a batch of noise, with its images in the type that is computed in."""
    batch = noise(images, setting)
    return replace(batch, images=batch.network_input(torch.bfloat16))


def timed(step: Step, setting: TrialSetting, images: int, steps: int) -> dict[str, float]:
    """Time steps in a row, after some that warm up."""
    batch = drawn(images, setting)
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


def compile_kernels(setting: TrialSetting) -> None:
    """Compile what a step will launch, as it is now patched, in threads."""
    with triton_kernels.compiled_ahead(os.cpu_count() or 1):
        imagined_step(setting.cast.network, setting.cast.criterion, torch.bfloat16)


def kernels_of(
    step: Step, setting: TrialSetting, images: int, steps: int = 3
) -> tuple[list[tuple[str, float, float]], float]:
    """Name every kernel with its milliseconds and launches per step, the most expensive first; and the time between."""
    batch = drawn(images, setting)
    for _ in range(steps):
        step(batch, RATES, completes=True)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(steps):
            step(batch, RATES, completes=True)
        torch.cuda.synchronize()
    times: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    for event in events:
        times[event.name] += event.device_time / 1e3
        launches[event.name] += 1
    span = max(event.time_range.end for event in events) - min(event.time_range.start for event in events)
    names = sorted(times, key=lambda name: -times[name])
    idle = span / 1e3 - sum(times.values())
    return [(name, times[name] / steps, launches[name] / steps) for name in names], idle / steps


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step is taken."""

    name: str
    ours: bool = True
    """Whether our kernels take part."""
    graphs: bool = True
    without: str = ""
    """What is left out, of `PARTS`."""


@contextmanager
def _without_lists() -> Iterator[None]:
    with (
        mock.patch("paceline.lists.usable", return_value=False),
        mock.patch("paceline.training.ahead._imagined_update"),  # torch's cannot be imagined
    ):
        yield


@contextmanager
def _in_order(number: int, x: torch.Tensor) -> Iterator[None]:
    yield


@contextmanager
def _without_branches() -> Iterator[None]:
    with (
        mock.patch.multiple("paceline.models.heads", apart=_in_order, together=lambda given: None),
        mock.patch("paceline.models.ends.apart", _in_order),
    ):
        yield


PARTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "halves": lambda: mock.patch("paceline.models.operations.half_weights.autocast_type", return_value=None),
    "lists": lambda: _without_lists(),
    "moments": lambda: mock.patch.object(BatchNorm, "takes_moments", return_value=False),
    "streams": lambda: mock.patch("paceline.models.operations.beside._is_recording", return_value=False),
    "branches": lambda: _without_branches(),
    "ends": lambda: mock.patch("paceline.models.ends.TYPES", frozenset()),
    "sums": lambda: mock.patch("paceline.models.operations.shared._left_of", return_value=None),
}
"""What can be left out, and how."""


def ways_of(options: argparse.Namespace) -> list[Way]:
    """Return the ways that are timed, in order."""
    if options.compare:
        left_out = ["", *options.compare]
        return [
            Way(name=f"{f'without {part}' if part else 'with all'}, {turn}", without=part)
            for turn in ("first", "again")
            for part in left_out
        ]
    if options.only_ours:
        return [Way(name="our kernels, graph")]
    return [
        Way(
            name=f"{'our kernels' if ours else 'torch alone'}, {'graph' if graphs else 'eager'}",
            ours=ours,
            graphs=graphs,
        )
        for ours in (False, True)
        for graphs in (False, True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--top", type=int, default=40, help="kernels that are listed")
    parser.add_argument("--only-ours", action="store_true", help="only the graph with our kernels")
    parser.add_argument("--compare", nargs="+", choices=PARTS, help="graphs with our kernels, with these and without")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__} | vars(options)
    for way in ways_of(options):
        setting = setting_of(options.model, options.imgsz, device)
        with ExitStack() as stack:
            if not way.ours:
                for room in ROOMS:
                    stack.enter_context(mock.patch(f"paceline.{room}.usable", return_value=False))
            if way.without:
                stack.enter_context(PARTS[way.without]())
            stack.enter_context(mock.patch.object(triton_kernels, "_launchers", {}))  # which know how to launch
            if way.ours:
                compile_kernels(setting)
            eager = understudy(setting.cast, Precision.named("bf16"))
            step = graphed(eager, CudaCapture(device)) if way.graphs else eager
            figures[way.name] = timed(step, setting, options.batch, options.steps)
            cells = ", ".join(f"{key} {value:,.2f}" for key, value in figures[way.name].items())
            print(f"{options.model} {way.name}: {cells}", flush=True)
            if way.graphs and not options.compare:
                stack.enter_context(PARTS["streams"]())
                setting = setting_of(options.model, options.imgsz, device)
                if way.ours:
                    compile_kernels(setting)
                step = graphed(understudy(setting.cast, Precision.named("bf16")), CudaCapture(device))
                found, figures[way.name]["idle_ms"] = kernels_of(step, setting, options.batch)
                busy_ms, idle_ms = sum(ms for _, ms, _ in found), figures[way.name]["idle_ms"]
                print(f"{busy_ms:9.3f} ms of kernels, {idle_ms:.3f} between them")
                figures[way.name]["kernels"] = sum(count for _, _, count in found)
                for kernel, ms, count in found[: options.top]:
                    print(f"{ms:9.3f} ms {count:6.1f} x  {kernel[:150]}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
