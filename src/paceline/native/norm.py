"""Norm: batch norm, and the activation and sum after it, by compiled code on the CPU, `norm.c`.

Maps are given by their addresses, as matrices of rows (cells) by channels that lie beside each other.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from paceline.native.compiled import Compiled

PIECES = 2
"""At most, into which the channels of a result are cut."""


class _Call(ctypes.Structure):
    """The struct of the same name, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "channels", "pieces", "is_half", "is_silu", "threads", "level")),
        ("team", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("z", ctypes.c_void_p * PIECES),
        ("z_pitch", ctypes.c_int64 * PIECES),
        ("carried", ctypes.c_void_p),
        ("carried_pitch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("of_x", "weight", "bias", "mean", "inverse", "of_mean", "of_variance")),
        *((name, ctypes.c_void_p) for name in ("of_weight", "of_bias")),
        ("eps", ctypes.c_double),
    )


def _declare(kernels: ctypes.CDLL) -> None:
    kernels.paceline_level.restype = ctypes.c_int32
    kernels.paceline_level.argtypes = []
    for function in (kernels.paceline_norm_forward, kernels.paceline_norm_apply, kernels.paceline_norm_backward):
        function.restype = ctypes.c_int32
        function.argtypes = [ctypes.POINTER(_Call)]


NORM = Compiled(
    name="norm",
    what="The compiled norms",
    otherwise="PyTorch takes their place, and training on a CPU takes half as long again.",
    declare=_declare,
    parts=("levels.h",),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cells:
    """A map x of the norm, and how it is to be worked on."""

    rows: int
    channels: int
    is_half: bool
    """bfloat16 in place of float32."""
    is_silu: bool
    threads: int
    x: int
    """Address; rows lie close together."""
    z: tuple[tuple[int, int], ...]
    """Address of each piece along the channels, and how many numbers its rows are apart; backward its gradient."""
    weight: int
    bias: int
    """Addresses of C, float32, as are those below."""
    mean: int
    inverse: int
    """Of the deviation."""


def kernels() -> ctypes.CDLL | None:
    """Return the compiled code where this machine has it, and vector units that it is fast with."""
    found = NORM.get()
    return found if found is not None and _level(found) > 0 else None


@functools.cache
def _level(kernels: ctypes.CDLL) -> int:
    level: int = kernels.paceline_level()
    return level


@functools.cache
def team() -> int | None:
    """Return the address of what starts the threads of this process' OpenMP runtime; None where there is none."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    return ctypes.cast(function, ctypes.c_void_p).value


def forward(
    kernels: ctypes.CDLL,
    cells: Cells,
    *,
    eps: float,
    of_mean: int,
    of_variance: int,
    carried: tuple[int, int] | None,
    level: int | None = None,
) -> None:
    """Write z, mean, inverse, the mean once more and the unbiased variance. Raises MemoryError.

    carried: address and pitch of what is added to z.
    """
    call = _call(kernels, cells, level)
    call.eps, call.of_mean, call.of_variance = eps, of_mean, of_variance
    if carried is not None:
        call.carried, call.carried_pitch = carried
    if not kernels.paceline_norm_forward(call):
        raise MemoryError


def apply(kernels: ctypes.CDLL, cells: Cells, *, carried: tuple[int, int] | None, level: int | None = None) -> None:
    """Write z by the mean and inverse that are given; one piece of it may lie where x does. Raises MemoryError.

    carried: address and pitch of what is added to z.
    """
    call = _call(kernels, cells, level)
    if carried is not None:
        call.carried, call.carried_pitch = carried
    if not kernels.paceline_norm_apply(call):
        raise MemoryError


def backward(
    kernels: ctypes.CDLL, cells: Cells, *, of_x: int, of_weight: int, of_bias: int, level: int | None = None
) -> None:
    """Write the gradients of x, whose rows lie close together, of weight and of bias. Raises MemoryError."""
    call = _call(kernels, cells, level)
    call.of_x, call.of_weight, call.of_bias = of_x, of_weight, of_bias
    if not kernels.paceline_norm_backward(call):
        raise MemoryError


def _call(kernels: ctypes.CDLL, cells: Cells, level: int | None) -> _Call:
    call = _Call(
        rows=cells.rows,
        channels=cells.channels,
        pieces=len(cells.z),
        is_half=cells.is_half,
        is_silu=cells.is_silu,
        threads=cells.threads,
        level=_level(kernels) if level is None else level,
        team=team(),
        x=cells.x,
        weight=cells.weight,
        bias=cells.bias,
        mean=cells.mean,
        inverse=cells.inverse,
    )
    for place, (address, pitch) in enumerate(cells.z):
        call.z[place], call.z_pitch[place] = address, pitch
    return call
