"""The limits of a device, measured: how fast it multiplies matrices and how fast it copies memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from paceline.planning.record import LimitsRecord
from paceline.planning.roofline import Rates
from paceline.planning.stopwatch import Stopwatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = 8
_TOO_LONG_S = 0.5
"""After a call of this length no larger size of it is tried: it would say the same."""


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What is measured on one kind of device."""

    squares: tuple[int, ...]
    """Sides of the matrices."""
    convolutions: tuple[tuple[int, int, int], ...]
    """Images, channels in and out, side of the map; kernels are 3 x 3."""
    copy_bytes: int
    """Far beyond every cache."""


_SIZES = {
    "cpu": _Sizes(squares=(512, 1024, 2048), convolutions=((8, 128, 40), (4, 64, 80)), copy_bytes=256 << 20),
    "cuda": _Sizes(squares=(2048, 4096, 8192), convolutions=((64, 256, 40), (64, 128, 80)), copy_bytes=1 << 30),
}


def measure_limits(device: torch.device, names: Sequence[str]) -> LimitsRecord:
    """Measure the matrix rate in each of the types `names`, and the copy bandwidth; takes a few seconds.

    The best of all rounds counts, since other work on the machine can only make one slower.
    """
    sizes, stopwatch = _SIZES.get(device.type, _SIZES["cpu"]), Stopwatch(device)
    rates, best = {}, {}
    for name in names:
        rates[name], best[name] = _matrix_rate(stopwatch, DTYPES[name], sizes)
    return LimitsRecord(operations_per_s=rates, best=best, bytes_per_s=_copy_rate(stopwatch, sizes))


def best_of(one: LimitsRecord, other: LimitsRecord) -> LimitsRecord:
    """Join two measurements of the same types on one device, of which neither can be too high."""
    higher = {
        name: one if found >= other.operations_per_s[name] else other for name, found in one.operations_per_s.items()
    }
    return LimitsRecord(
        operations_per_s={name: limits.operations_per_s[name] for name, limits in higher.items()},
        best={name: limits.best[name] for name, limits in higher.items()},
        bytes_per_s=max(one.bytes_per_s, other.bytes_per_s),
    )


def rates_of(limits: LimitsRecord, precision: str) -> Rates:
    """Return the limits for a step that computes in `precision`."""
    return Rates(operations_per_s=limits.operations_per_s[precision], bytes_per_s=limits.bytes_per_s)


@torch.inference_mode()
def _matrix_rate(stopwatch: Stopwatch, dtype: torch.dtype, sizes: _Sizes) -> tuple[float, str]:
    """Return the highest operations per second, and of what."""
    device, found = stopwatch.device, []
    for side in sizes.squares:
        left, right = (torch.randn(side, side, device=device, dtype=torch.float32).to(dtype) for _ in range(2))
        answer = torch.empty(side, side, device=device, dtype=dtype)
        shortest_s = _shortest(stopwatch, partial(torch.mm, left, right, out=answer))
        found.append((2 * side**3 / shortest_s, f"{side} x {side} matrices"))
        if shortest_s > _TOO_LONG_S:
            break
    for images, channels, side in sizes.convolutions:
        maps = torch.randn(images, channels, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
        shortest_s = _shortest(stopwatch, partial(F.conv2d, maps, weight, padding=1))
        operations = 2 * images * side * side * channels * channels * 9
        found.append((operations / shortest_s, f"3 x 3 convolution of {channels} channels, {side} x {side}"))
        if shortest_s > _TOO_LONG_S:
            break
    return max(found)


@torch.inference_mode()
def _copy_rate(stopwatch: Stopwatch, sizes: _Sizes) -> float:
    """Return bytes per second of a copy, read and written ones together."""
    source = torch.zeros(sizes.copy_bytes, dtype=torch.uint8, device=stopwatch.device)
    target = torch.ones_like(source)
    return 2 * sizes.copy_bytes / _shortest(stopwatch, lambda: target.copy_(source))


def _shortest(stopwatch: Stopwatch, call: Callable[[], object]) -> float:
    """Return the least seconds of a call, after one that does not count."""
    first_s = stopwatch.seconds(call)
    times = max(1, round(0.02 / max(stopwatch.seconds(call), 1e-6))) if first_s < _TOO_LONG_S else 1
    return min(stopwatch.seconds(call, times=times) for _ in range(ROUNDS if first_s < _TOO_LONG_S else 1))
