"""Launch: kernels started again as they were started before, past most of what Triton asks at each launch.

Triton has compiled a kernel for kinds of arguments: for types, constants, and numbers and addresses that 16 divides.
At each launch it finds out anew which kind is asked for, in some ten microseconds. Here a key that tells no less apart
is looked up: type, device and alignment of every tensor and every large number, every other argument as it is, every
option, and the current device. What is found is launched by Triton's own launcher, with the addresses in place of the
tensors; what is not goes through Triton once, checks of the tensors included. This module needs Triton.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.language import constexpr
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

log = logging.getLogger("paceline")

FIRST_KNOWN, LAST_KNOWN = (3, 6), (3, 9)
"""Versions of Triton that compile for nothing but what a key holds, and are launched alike."""
_MOST_KINDS = 4096
"""That a kernel is remembered with; then it starts anew, lest numbers that never come again fill the memory."""
_ALIGNMENT = 16
_LARGE = 1 << 31
"""From here on, and below its negative, numbers have 64 bits, and which they are makes no other kernel."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """A kernel that was launched before; it is unloaded from the device when nobody holds it."""

    compiled: CompiledKernel
    run: Callable[..., None]
    function: int
    metadata: Any
    constants: tuple[Any, ...]
    """After the arguments, in the order of the kernel."""


class Launcher:
    """Starts one kernel."""

    def __init__(self, kernel: JITFunction[Any]) -> None:
        self._kernel = kernel
        self._current_device: Callable[[], int] = driver.active.get_current_device
        self._current_stream: Callable[[int], int] = driver.active.get_current_stream
        self._known: dict[tuple[Any, ...], _Ready] = {}
        self._is_refused = False
        """Whether Triton's launcher does not take what it is given here."""

    def __call__(self, grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Launch on the current stream of the current device."""
        device = self._current_device()
        key: list[Any] = [device, *options, *options.values()]
        values: list[Any] = []
        _look_at(arguments, key, values)
        ready = self._known.get(tuple(key))
        if ready is None or _is_watched():
            self._launch_anew(tuple(key), grid, arguments, options)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = self._current_stream(device)
        nobody = (None, None, None)  # who wants to know of launches
        try:
            ready.run(x, y, z, stream, ready.function, ready.metadata, *nobody, *values, *ready.constants)
        except TypeError as error:  # it reads its arguments first, so nothing was launched
            self._is_refused = True
            self._known.clear()
            log.info("Triton %s starts kernels another way (%s), so it is asked each time.", triton.__version__, error)
            self._launch_anew(tuple(key), grid, arguments, options)

    def _launch_anew(
        self, key: tuple[Any, ...], grid: tuple[int, ...], arguments: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        """Launch as Triton does, and remember what was launched."""
        kernel = self._kernel
        compiled = kernel[grid](*arguments, **options)
        others = kernel.params[len(arguments) :]
        constant = all(isinstance(value, constexpr) for value, _ in kernel.used_global_vals.values())
        is_plain = constant and not self._is_refused and not kernel.pre_run_hooks
        if not (is_plain and type(compiled) is CompiledKernel and all(other.is_constexpr for other in others)):
            return
        if len(self._known) >= _MOST_KINDS:
            self._known.clear()
        constants = tuple(options.get(other.name, other.default) for other in others)
        self._known[key] = _Ready(compiled, compiled.run, compiled.function, compiled.packed_metadata, constants)


def launcher_of(kernel: Any) -> Callable[[tuple[int, ...], Sequence[Any], Mapping[str, Any]], None]:
    """Return what starts a kernel: its launcher, or Triton alone for another version, another GPU's or no compiler."""
    if type(kernel) is JITFunction and _is_known():
        return Launcher(kernel)
    return lambda grid, arguments, options: kernel[grid](*arguments, **options)


def _is_known() -> bool:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    return FIRST_KNOWN <= version <= LAST_KNOWN and torch.version.hip is None


def _is_watched() -> bool:
    """Whether a profiler of Triton's wants to know of launches."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def _look_at(arguments: Sequence[Any], key: list[Any], values: list[Any]) -> None:
    """Append what the kernel hangs on, and what it is launched with."""
    for value in arguments:
        if value.__class__ is int:
            key.append(value if -_LARGE <= value < _LARGE else (value % _ALIGNMENT == 0, value >= 1 << 63))
            values.append(value)
        elif isinstance(value, Tensor):
            address = value.data_ptr()
            key += (value.dtype, value.get_device(), address % _ALIGNMENT)
            values.append(address)
        elif value.__class__ is tuple:
            kinds: list[Any] = []
            inner: list[Any] = []
            _look_at(value, kinds, inner)
            key.append(tuple(kinds))
            values.append(tuple(inner))
        else:
            key.append((value.__class__, value))
            values.append(value)
