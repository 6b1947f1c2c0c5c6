"""Stand-in: what Triton finds in place of a GPU, so that kernels can be started where there is none.

Nothing is compiled and nothing computed. What would have been launched is noted, or only passed by; Triton's own way
there is as on a GPU, up to the launcher in C. Written for Triton 3.6 to 3.9.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass
class Launched:
    """One launch, as the launcher in C gets it."""

    kernel: CompiledKernel
    grid: tuple[int, int, int]
    stream: int
    values: tuple[Any, ...]
    """Arguments and constants in the order of the kernel: numbers, tensors or their addresses."""


@dataclass
class StandIn:
    """Triton's driver; the device and the stream that are current may be changed."""

    notes: bool = True
    device: int = 0
    stream: int = 0
    launches: list[Launched] = field(default_factory=list)
    num_compiled: int = 0

    def get_current_device(self) -> int:
        """Return its number."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Return its handle, on whatever device."""
        return self.stream

    def get_current_target(self) -> GPUTarget:
        """Return what would be compiled for."""
        return GPUTarget("cuda", 90, 32)

    def compile(self, src: Any) -> CompiledKernel:
        """Make what a compiler would give, loaded already."""
        self.num_compiled += 1
        compiled = object.__new__(CompiledKernel)
        compiled.src, compiled.name, compiled.metadata, compiled.packed_metadata = src, src.name, None, (4, 1, 0)
        compiled.module, compiled.function, compiled._module_pid = "loaded", self.num_compiled, None

        def run(x: int, y: int, z: int, stream: int, function: int, packed: Any, told: Any, *rest: Any) -> None:
            enter, leave, *values = rest
            if enter is not None:
                enter(told)
            if self.notes:
                assert (function, packed) == (compiled.function, compiled.packed_metadata)
                self.launches.append(Launched(compiled, (x, y, z), stream, tuple(values)))
            if leave is not None:
                leave(told)

        compiled._run = run
        return compiled


@contextmanager
def standing_in(*, notes: bool = True) -> Iterator[StandIn]:
    """Let kernels that have not been launched before be launched on a stand-in; they cannot be on a GPU, then."""
    stand_in = StandIn(notes=notes)

    def compile_for(
        kernel: Any, key: Any, signature: Any, device: int, constants: Any, _: Any, attributes: Any, *__: Any
    ) -> Any:
        compiled = stand_in.compile(kernel.ASTSource(kernel, signature, constants, attributes))
        kernel.device_caches[device][0][key] = compiled
        return compiled

    with (
        mock.patch.object(driver, "_active", stand_in),
        mock.patch.object(JITFunction, "_do_compile", compile_for),
    ):
        yield stand_in
