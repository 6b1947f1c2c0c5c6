"""Kernels of pools, biases and upsampling under Triton's own compiler, which is stricter and needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys
from pathlib import Path

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from paceline.models import bias_kernels, doubling, doubling_kernels, fused_bias, fused_pool, pool_kernels

folder = Path(sys.argv[1])
kinds = {"places": "*u8", "parts": "*fp32", "sums": "*fp32"}
numbers = ("x_pitch", "pooled_pitch", "beside_pitch", "image_pitch", "pitch", "width", "height", "num_strips")
numbers += ("num_channels", "num_cells", "image_cells", "part_cells", "num_parts")
kinds |= dict.fromkeys(numbers, "i32")


def of_pools(tile, channels):
    return dict(rows=tile.rows, cells=tile.cells(channels), channels=channels, unroll=tile.unroll), tile.warps


def of_cells(tile, channels):
    return dict(cells=tile.numbers // channels, channels=channels), tile.warps


def of_sums(channels, **ways):
    return dict(cells=fused_bias.LAUNCH.tile // channels, channels=channels, **ways), fused_bias.LAUNCH.warps


def of_maps(channels, copies):
    sizes, warps = of_pools(fused_pool.FORWARD, channels)
    yield pool_kernels._pool, sizes | dict(copies=copies), warps
    yield pool_kernels._pool_gradient, *of_pools(fused_pool.BACKWARD, channels)
    yield doubling_kernels._double, *of_cells(doubling.FORWARD, channels)
    yield doubling_kernels._halve, *of_cells(doubling.BACKWARD, channels)
    yield bias_kernels._sums, *of_sums(channels, copies=copies, fits=True, step=8)


wide = list(of_maps(64, True))
rarer = [*of_maps(8, False), (bias_kernels._sums, *of_sums(4, copies=True, fits=False, step=1))]
rarer.append((bias_kernels._sums, *of_sums(128, copies=True, fits=False, step=8)))
rarer.append((bias_kernels._settle, dict(parts_room=512, channels=8), 4))
made = 0
for values in ("*bf16", "*fp32"):
    for kernel, fixed, warps in wide + (rarer if values == "*bf16" else []):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in fixed else kinds.get(name, values) for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        constants = {(names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        if fixed.get("step", 8) == 8 and kernel is not bias_kernels._settle:
            ptx = compiled.asm["ptx"]
            assert "ld.global.v4.b32" in ptx, (kernel.__name__, fixed, "eight channels are loaded at once")
            assert "st.global.b16" not in ptx, (kernel.__name__, fixed, "and never written one by one")
            assert "st.global.b8" not in ptx, (kernel.__name__, fixed, "nor are the places")
            if kernel is not bias_kernels._sums and values != "*fp32":
                assert compiled.metadata.shared == 0, (kernel.__name__, fixed, "lanes have nothing to exchange")
        folder.joinpath(f"{made}_{kernel.__name__}.cubin").write_bytes(compiled.asm["cubin"])
        made += 1
print("compiled", made)
"""


@pytest.fixture(scope="module")
def binaries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the machine code of every kernel, for a Hopper GPU."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("binaries")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        run = subprocess.run([sys.executable, "-c", _PROGRAM, folder], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["compiled", "18"], run.stderr
    return folder


def test_the_kernels_compile_for_hopper(binaries: Path) -> None:
    assert len(list(binaries.glob("*.cubin"))) == 18


def test_no_kernel_spills_registers(binaries: Path) -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no tool that tells")
    for path in sorted(binaries.glob("*.cubin")):
        run = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
        assert "STACK:0" in run.stdout, (path.name, run.stdout)
        assert "LOCAL:0" in run.stdout, (path.name, run.stdout)
