"""Kernels under Triton's own compiler, which is stricter than its interpreter and needs no GPU.

A test hands a program to `run_apart`, since Triton decides when it is imported whether it interprets; the program names
kernels to `compiled`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

ALIGNED = [["tt.divisibility", 16]]


def run_apart(program: str, folder: Path, *words: str) -> str:
    """Run a program in a process of its own, with its caches in a folder; returns what it prints."""
    environment = dict(os.environ, TRITON_CACHE_DIR=str(folder / "cache"))
    environment.pop("TRITON_INTERPRET", None)
    places = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    run = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=False, env=environment
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def compiled(
    kernel: Any,
    fixed: Mapping[str, Any],
    kinds: Mapping[str, Any],
    *,
    other: str = "i32",
    warps: int = 4,
    capability: int = 90,
) -> Any:
    """Compile a kernel for a GPU of such a capability.

    fixed: its constants. kinds: types of arguments by name, or tuples of them; `other` of the rest. Addresses are
    multiples of 16.
    """
    from triton import compiler
    from triton.backends.compiler import GPUTarget

    names = kernel.arg_names
    signature = {name: "constexpr" if name in fixed else kinds.get(name, other) for name in names}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, name in enumerate(names):
        kind = signature[name]
        if isinstance(kind, tuple):
            attributes |= {(place, nth): ALIGNED for nth, part in enumerate(kind) if part.startswith("*")}
        elif kind.startswith("*"):
            attributes[(place,)] = ALIGNED
    constants = {(names.index(name),): value for name, value in fixed.items()}
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    made = compiler.compile(source, target=target, options={"num_warps": warps})
    assert len(made.asm["cubin"]) > 1000
    return made


@dataclass(frozen=True)
class Usage:
    """What a thread takes."""

    registers: int
    spilled: int
    """Bytes of memory that stand in for registers."""


def usage_of(made: Any) -> Usage:
    """Ask NVIDIA's tool, which comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", told)}
    return Usage(registers=numbers["REG"], spilled=numbers["STACK"] + numbers["LOCAL"])
