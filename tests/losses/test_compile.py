"""The kernels of the loss under Triton's own compiler, which is stricter than its interpreter and needs no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compiling import run_apart

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM = """
from compiling import compiled, usage_of

from paceline.losses.assign_kernels import _claim, _contest, _search, _target
from paceline.losses.sum_kernels import _box_gradient, _class_gradient, _sum_boxes, _sum_classes

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
        result = compiled(kernel, sizes, own, other="*fp32")
        assert result.metadata.shared <= 2048, "only to add up, and to bring rows of bins to the lanes of points"
        used = usage_of(result)
        assert not used.spilled and used.registers <= 128, (kernel.__name__, sizes, used)
        made += 1
print("compiled", made)
"""


def test_the_kernels_compile_for_hopper_and_spill_no_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled 30"
