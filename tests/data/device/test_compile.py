"""The kernel under Triton's own compiler, which is stricter than its interpreter and needs no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compiling import run_apart

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from paceline.data.device.kernel import _draw

kinds = dict(sources="*u8", masks="*u8", starts="*i64", mask_starts="*i64", tiles_int="*i32", tiles_float="*fp32")
kinds |= dict(pictures_int="*i32", pictures_float="*fp32")
sizes = dict(size=640, num_tiles=4, rows=8, columns=64)
for out in ("*bf16", "*fp16", "*fp32"):
    signature = kinds | {"out": out} | dict.fromkeys(sizes, "constexpr")
    source = ASTSource(fn=_draw, signature=signature, constexprs=sizes)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert len(made.asm["cubin"]) > 1000
    assert made.metadata.shared == 0, "programs share nothing, so no value changes its layout"
print("compiled")
"""


def test_the_kernel_compiles_for_hopper(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled"
