"""Triton kernels: whether a device can run them, which is asked once and said where it cannot; how they are started.

A kernel is compiled when it is launched first, for each type and constant anew: one after the other a minute for a
network on a machine that has not seen it. Within `compiled_ahead` what a step would launch is compiled in threads: on
the `meta` device, where tensors have shapes and types and no numbers, a step names all its kernels in a second.
"""

from __future__ import annotations

import functools
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

log = logging.getLogger("paceline")

SWITCH = "PACELINE_KERNELS"
"""Environment variable that leaves all to torch where it is `off`."""
LEAST_CAPABILITY = (8, 0)
"""Older GPUs have no bfloat16, and nobody has tried the kernels on them."""
KEPT_CUTS = 4096
"""Sizes for which it is remembered how kernels cut them."""

_is_ahead: ContextVar[bool] = ContextVar("_is_ahead", default=False)
"""Whether kernels are compiled in place of being launched."""
_are_left_out: ContextVar[bool] = ContextVar("_are_left_out", default=False)
"""Whether torch does all of a step, though kernels could."""
_distrusted: set[int] = set()
"""Numbers of devices on which kernels were found to compute something else than torch."""
_launchers: dict[int, Callable[[tuple[int, ...], Sequence[Any], Mapping[str, Any]], None]] = {}
"""What starts each kernel, by the `id` of one that it holds on to; to hash a kernel takes as long as to launch it."""


@contextmanager
def compiled_ahead(threads: int) -> Iterator[None]:
    """Compile what is launched on tensors of the `meta` device meanwhile; all is compiled at the end.

    Needs a CUDA device that kernels run on, and is for one thread. What cannot be compiled is left to its launch.
    """
    from triton import AsyncCompileMode

    token = _is_ahead.set(True)
    try:
        with ThreadPoolExecutor(threads) as pool, AsyncCompileMode(pool, ignore_errors=True):
            yield
    finally:
        _is_ahead.reset(token)


@contextmanager
def kernels_left_out() -> Iterator[None]:
    """Leave what this thread computes inside to torch; a backward pass follows what was done forward."""
    token = _are_left_out.set(True)
    try:
        yield
    finally:
        _are_left_out.reset(token)


def are_left_out() -> bool:
    """Whether torch is to do all of a step at the moment, or always."""
    return _are_left_out.get() or os.environ.get(SWITCH) == "off"


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the current stream; within `compiled_ahead`, compile it.

    Raises RuntimeError, as torch does, also where Triton cannot compile it or the device has no room for it.
    """
    try:
        if _is_ahead.get():
            kernel.warmup(*arguments, grid=grid, **options)
            return
        launch = _launchers.get(id(kernel))
        if launch is None:
            from paceline.triton_launch import launcher_of  # which needs Triton

            launch = _launchers[id(kernel)] = launcher_of(kernel)
        launch(grid, arguments, options)
    except RuntimeError:
        raise
    except Exception as error:
        raise RuntimeError(
            f"The kernel {kernel.__name__} cannot be started here ({type(error).__name__}: {str(error)[:200]}); "
            f"{SWITCH}=off does without kernels."
        ) from error


def cdiv(count: int, size: int) -> int:
    """Return how many pieces of a size hold so many; `triton.cdiv` takes fifteen times as long on the host."""
    return -(-count // size)


def next_power_of_2(number: int) -> int:
    """Return the least power of two that is not below a positive number."""
    return 1 << (number - 1).bit_length()


def on_gpu(values: torch.Tensor) -> bool:
    """Whether kernels may work on a tensor: on a GPU, or on the `meta` device within `compiled_ahead`."""
    return values.is_cuda or (values.is_meta and _is_ahead.get())


def has_ptx(values: torch.Tensor) -> bool:
    """Whether NVIDIA's instructions may be named: not under Triton's interpreter, nor on another's GPU."""
    return on_gpu(values) and torch.version.hip is None


def has_pairs(values: torch.Tensor) -> bool:
    """Whether one instruction compares two numbers of half precision, bfloat16 too: NVIDIA's from capability 9.0 on."""
    return has_ptx(values) and torch.cuda.get_device_capability(_number_of(values.device)) >= (9, 0)


def shared_bytes(values: torch.Tensor) -> int:
    """Return how much memory a program may share among its threads, as far as NVIDIA's GPUs tell; else none."""
    if not has_ptx(values):
        return 0
    properties: Any = torch.cuda.get_device_properties(_number_of(values.device))
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def autocast_type(values: torch.Tensor) -> torch.dtype | None:
    """Return the type that autocast would now compute in with a tensor; None where it leaves that as it is."""
    kind = "cuda" if values.is_meta else values.device.type
    if values.dtype is torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def usable(device: torch.device) -> bool:
    """Whether kernels are to run on a device; why a CUDA device cannot is in the log, once per process."""
    if device.type == "meta":
        return _is_ahead.get()
    if device.type != "cuda" or _are_left_out.get():
        return False
    number = _number_of(device)
    return number not in _distrusted and _works_on(number)


def distrust(device: torch.device) -> None:
    """Leave all on a CUDA device to torch from now on, in this process."""
    _distrusted.add(_number_of(device))


def takes_map(values: torch.Tensor) -> bool:
    """Whether kernels take a BCHW map in the step at hand: on such a device, channels-last, of a type of theirs."""
    return (
        on_gpu(values)
        and not torch.compiler.is_compiling()
        and values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and values.numel() > 0
        and values.is_contiguous(memory_format=torch.channels_last)
        and usable(values.device)
    )


def _number_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@functools.cache
def _works_on(number: int) -> bool:
    reason = _why_not(torch.device("cuda", number))
    if reason:
        log.warning("Triton's kernels cannot be used on cuda:%d: %s; torch's take their place.", number, reason)
        return False
    return True


def _why_not(device: torch.device) -> str:
    """Compile and run the smallest kernel; return why that is not possible, or nothing."""
    if os.environ.get(SWITCH) == "off":
        return f"{SWITCH} is off"
    capability = torch.cuda.get_device_capability(device)
    if capability < LEAST_CAPABILITY:
        return f"its compute capability is {capability[0]}.{capability[1]}, and they need {LEAST_CAPABILITY[0]}"
    try:
        from paceline.triton_probe import increment

        with torch.cuda.device(device):
            value = torch.zeros(1, device=device)
            increment(value)
            return "" if float(value) == 1.0 else "the first one gave a wrong result"
    except Exception as error:  # no Triton, no C compiler for it, no driver: every one of its own kind
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {first.strip()[:200]}".rstrip(":. ")
