"""What an eager step with our kernels costs the host, where there is no GPU: launches end before the launcher in C.

    python bench/step/host.py [--model yolo11n] [--repeats 15]

Microseconds of processor time, the least of the repeats: of a unit, forward and backward, twelve of them in a row, with
and without its launches; and of the launches of a whole step, which is taken on the `meta` device. It measures whatever
commit `PYTHONPATH` points to. What torch and the driver take to launch, as much for any commit, is left out. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from stand_in import standing_in
from torch.nn import functional as F
from triton.runtime.jit import JITFunction

from paceline import triton_kernels
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.operations import fused_joint, fused_norm, narrow_conv
from paceline.models.registry import build_model
from paceline.training.ahead import imagined_step

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

UNITS, PASSES = 12, 40
LAST = torch.channels_last


def _map(channels: int) -> Tensor:
    return torch.randn(2, channels, 8, 8).to(torch.bfloat16).contiguous(memory_format=LAST).requires_grad_()


def chains() -> dict[str, tuple[Any, Callable[[], None]]]:
    """Return rows of each unit, and the module that launches it; none for what torch computes."""
    wide, narrow = _map(64), _map(16)
    weight, bias = torch.ones(64, requires_grad=True), torch.zeros(64, requires_grad=True)
    latest = (torch.zeros(64), torch.zeros(64))
    of_joint, of_narrow = torch.randn(64, 128, 1, 1, requires_grad=True), torch.randn(16, 16, 3, 3, requires_grad=True)

    def chain(unit: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
        gradient = x.detach().clone(memory_format=LAST)

        def run() -> None:
            y = x
            for _ in range(UNITS):
                y = unit(y)
            y.backward(gradient)
            for leaf in (x, weight, bias, of_joint, of_narrow):
                leaf.grad = None

        return run

    def norm(x: Tensor) -> Tensor:
        return fused_norm.normed_and_activated(x, weight, bias, latest, eps=1e-3, silu=True)[0]

    return {
        "norm": (fused_norm, chain(norm, wide)),
        "joint": (fused_joint, chain(lambda x: fused_joint.convolved(of_joint, [x, wide], torch.bfloat16), wide)),
        "narrow": (narrow_conv, chain(lambda x: narrow_conv.convolved(x, of_narrow, 1, torch.bfloat16), narrow)),
        "norm and SiLU of torch, computed": (
            None,
            chain(lambda x: F.silu(F.batch_norm(x, *latest, weight, bias, True, 1.0, 1e-3)), wide),
        ),
    }


def least_us(run: Callable[[], None], repeats: int) -> float:
    """Time a row, per unit."""
    run()
    found = []
    for _ in range(repeats):
        begun = time.thread_time()
        for _ in range(PASSES):
            run()
        found.append((time.thread_time() - begun) / PASSES / UNITS * 1e6)
    return min(found)


def _do_nothing(*_: Any, **__: Any) -> None:
    pass


def unit_row(module: Any, run: Callable[[], None], repeats: int) -> dict[str, float]:
    whole = least_us(run, repeats)
    if module is None:
        return {"unit_us": whole}
    launches: list[object] = []

    def note(*_: Any, **__: Any) -> None:
        launches.append(None)

    with mock.patch.object(module, "start_kernel", note):
        run()
    with mock.patch.object(module, "start_kernel", _do_nothing):
        rest = least_us(run, repeats)
    number = len(launches) / UNITS
    return {"unit_us": whole, "launches": number, "launch_us": (whole - rest) / number, "else_us": rest}


def step_row(model: str, repeats: int) -> dict[str, float]:
    """Time the launches of whole steps."""
    network, criterion = build_model(model, 80), DetectionLoss(LossConfig(), 80)
    spent: list[float] = []

    def launched(kernel: Any, *given: Any, grid: Any, **options: Any) -> None:
        token = triton_kernels._is_ahead.set(False)
        with torch._C.DisableTorchFunction():  # of what makes a step imaginable, which a real one does not have
            begun = time.thread_time()
            triton_kernels.start_kernel(kernel, grid, *given, **options)
            spent.append(time.thread_time() - begun)
        triton_kernels._is_ahead.reset(token)

    totals = []
    with (
        mock.patch.object(JITFunction, "warmup", launched),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        token = triton_kernels._is_ahead.set(True)
        for _ in range(repeats + 1):
            spent.clear()
            imagined_step(network, criterion, torch.bfloat16)
            totals.append(sum(spent))
        triton_kernels._is_ahead.reset(token)
    return {"launches": len(spent), "launches_ms": min(totals[1:]) * 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="yolo11n")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, dict[str, float]] = {}
    with standing_in(notes=False):
        for name, (module, run) in chains().items():
            rows[name] = unit_row(module, run, arguments.repeats)
        rows[f"a step of {arguments.model}"] = step_row(arguments.model, max(arguments.repeats // 3, 1))
    for name, row in rows.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in row.items()))
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
