"""Kernels of pools, biases and upsampling under Triton's own compiler, which is stricter and needs no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compiling import run_apart

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM = """
from compiling import compiled, usage_of

from paceline.models.operations import bias_kernels, doubling, doubling_kernels, fused_bias, fused_pool, pool_kernels

kinds = {"places": "*u8", "parts": "*fp32", "sums": "*fp32"}
numbers = ("x_pitch", "pooled_pitch", "beside_pitch", "image_pitch", "pitch", "width", "height", "num_strips")
numbers += ("num_channels", "num_cells", "image_cells", "part_cells", "num_parts")
kinds |= dict.fromkeys(numbers, "i32")


def of_pools(tile, channels):
    return dict(rows=tile.rows, cells=tile.cells(channels), channels=channels), tile.warps


def of_cells(tile, channels):
    return dict(cells=tile.numbers // channels, channels=channels), tile.warps


def of_sums(channels, **ways):
    return dict(cells=fused_bias.LAUNCH.tile // channels, channels=channels, **ways), fused_bias.LAUNCH.warps


def of_maps(channels, copies, pairs):
    sizes, warps = of_pools(fused_pool.FORWARD, channels)
    yield pool_kernels._pool, sizes | dict(copies=copies, pairs=pairs), warps
    yield pool_kernels._pool_gradient, *of_pools(fused_pool.BACKWARD, channels)
    yield doubling_kernels._double, *of_cells(doubling.FORWARD, channels)
    yield doubling_kernels._halve, *of_cells(doubling.BACKWARD, channels)
    yield bias_kernels._sums, *of_sums(channels, copies=copies, fits=True, step=8)


wide = list(of_maps(64, True, False))
rarer = [*of_maps(8, False, False), next(of_maps(64, True, True))]
rarer.append((bias_kernels._sums, *of_sums(4, copies=True, fits=False, step=1)))
rarer.append((bias_kernels._sums, *of_sums(128, copies=True, fits=False, step=8)))
rarer.append((bias_kernels._settle, dict(parts_room=512, channels=8), 4))
made = 0
for values in ("*bf16", "*fp32"):
    for kernel, fixed, warps in wide + (rarer if values == "*bf16" else []):
        result = compiled(kernel, fixed, kinds, other=values, warps=warps)
        if fixed.get("step", 8) == 8 and kernel is not bias_kernels._settle:
            ptx = result.asm["ptx"]
            assert "ld.global.v4.b32" in ptx, (kernel.__name__, fixed, "eight channels are loaded at once")
            assert "st.global.b16" not in ptx, (kernel.__name__, fixed, "and never written one by one")
            assert "st.global.b8" not in ptx, (kernel.__name__, fixed, "nor are the places")
            if kernel is not bias_kernels._sums and values != "*fp32":
                assert result.metadata.shared == 0, (kernel.__name__, fixed, "lanes have nothing to exchange")
        assert not usage_of(result).spilled, (kernel.__name__, fixed)
        if fixed.get("pairs"):
            assert "set.gt.u32.bf16x2" in ptx, "two numbers are compared by one instruction"
            assert "setp.gt.f32" not in ptx and "setp.gt.bf16" not in ptx, "and none alone"
        made += 1
print("compiled", made)
"""


def test_the_kernels_compile_for_hopper_and_spill_no_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled 19"
