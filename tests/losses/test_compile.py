"""The kernels of the loss under Triton's own compiler, which is stricter than its interpreter and needs no GPU."""

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

from paceline.losses.assign_kernels import _claim, _contest, _search, _target
from paceline.losses.sum_kernels import _box_gradient, _class_gradient, _sum_boxes, _sum_classes

folder = Path(sys.argv[1])
kinds = dict.fromkeys(("best", "first", "last", "label", "picked"), "*i32")
kinds |= dict.fromkeys(("owner", "owners", "point", "slot_owner", "slot_point"), "*i32")
kinds |= {"labels": "*i64", "valid": "*u8", "least_side": "fp32", "num_logits": "i64"}
kinds |= dict.fromkeys(("num_points", "num_boxes", "num_slots", "num_classes"), "i32")
topk, blocks = {"topk": 10}, [{"every": every, "block": 128} for every in (False, True)]
alike = [(_claim, topk | {"block": 1024}), *((_target, sizes) for sizes in blocks)]
typed = [(_search, {"bins": 16, "block": 128}), *((_contest, topk | sizes) for sizes in blocks)]
typed += [(kernel, {"bins": 16, "block": 32}) for kernel in (_sum_boxes, _box_gradient)]
typed += [(kernel, {"num_classes": 80, "block": 2048}) for kernel in (_sum_classes, _class_gradient)]
rarer = [(kernel, {"bins": bins, "block": 32}) for kernel in (_sum_boxes, _box_gradient) for bins in (2, 32)]
rarer += [(kernel, {"num_classes": 1, "block": 2048}) for kernel in (_sum_classes, _class_gradient)]
made = 0
for outputs in ("*bf16", "*fp16", "*fp32"):
    own = kinds | dict.fromkeys(("raw", "logits", "gradient"), outputs)
    for kernel, sizes in typed + (alike + rarer if outputs == "*bf16" else []):
        names = kernel.arg_names
        signature = {name: "constexpr" if name in sizes else own.get(name, "*fp32") for name in names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
        compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        assert len(compiled.asm["cubin"]) > 1000
        assert compiled.metadata.shared <= 2048, "only to add up, and to bring rows of bins to the lanes of points"
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
    assert run.stdout.split() == ["compiled", "30"], run.stderr
    return folder


def test_the_kernels_compile_for_hopper(binaries: Path) -> None:
    assert len(list(binaries.glob("*.cubin"))) == 30


def test_no_kernel_spills_registers(binaries: Path) -> None:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton brings no tool that tells")
    for path in sorted(binaries.glob("*.cubin")):
        run = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
        assert "STACK:0" in run.stdout, (path.name, run.stdout)
        assert "LOCAL:0" in run.stdout, (path.name, run.stdout)
        assert int(run.stdout.split("REG:")[1].split()[0]) <= 128, (path.name, run.stdout)
