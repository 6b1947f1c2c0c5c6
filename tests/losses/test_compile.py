"""The kernels of the loss under Triton's own compiler, which is stricter than its interpreter and needs no GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from compiling import run_apart

if TYPE_CHECKING:
    from pathlib import Path

_PROGRAM = """
from compiling import compiled, usage_of

from paceline.losses import fused
from paceline.losses.assign_kernels import _claim, _contest, _decode, _pick, _target
from paceline.losses.sum_kernels import _add_up, _fill_gradients, _slot_gradients, _sum_slots, _sum_softplus

kinds = dict.fromkeys(("first", "last", "picked", "owner", "owners", "point", "slot_owner", "slot_point"), "*i32")
kinds |= dict.fromkeys(("best", "claims", "labels"), "*i64") | {"valid": "*u8", "num_logits": "i64"}
kinds |= dict.fromkeys(("least_side", "gain", "box_gain", "class_gain", "focal_gain"), "fp32")
kinds |= dict.fromkeys(("num_points", "num_boxes", "num_slots", "num_classes", "num_pieces", "num_raw"), "i32")
kinds |= dict.fromkeys(("height", "width", "num_rows", "num_blocks"), "i32")
ptx, slots = {"ptx": True}, [fused._SLOTS | {"every": every} for every in (False, True)]
topk, levels = {"topk": 10, "room": 16}, {"finest": 8, "num_levels": 3}
picking = topk | fused._PICKED | {"most_pieces": fused._PIECES}
alike = [(_pick, picking), (_add_up, fused._ADDED), *((_target, sizes) for sizes in slots)]
typed = [(_decode, ptx | fused._DECODED | {"bins": 16})]
typed += [(_claim, ptx | topk | levels | fused._CLAIMED)]
typed += [(_contest, ptx | {"topk": 10} | sizes) for sizes in slots]
of_slots = {_sum_slots: fused._ROWS, _slot_gradients: ptx | fused._ROWS}
typed += [(kernel, sizes | {"bins": 16}) for kernel, sizes in of_slots.items()]
typed += [(_sum_softplus, ptx | fused._SUMMED), (_fill_gradients, ptx | fused._FILLED)]
rarer = [(kernel, sizes | {"bins": bins}) for kernel, sizes in of_slots.items() for bins in (2, 32)]
rarer += [(_decode, ptx | fused._DECODED | {"bins": bins}) for bins in (2, 32)]
rarer += [(_claim, ptx | {"topk": 40, "room": 64} | levels | fused._CLAIMED)]
made = 0
for outputs in ("*bf16", "*fp16", "*fp32"):
    own = kinds | dict.fromkeys(("raw", "logits", "of_raw", "of_logits"), outputs)
    for kernel, sizes in typed + (alike + rarer if outputs == "*bf16" else []):
        fixed = {name: value for name, value in sizes.items() if name != "num_warps"}
        result = compiled(kernel, fixed, own, other="*fp32", warps=sizes.get("num_warps", 4))
        assert result.metadata.shared <= 2048, "only to add up, and to bring rows of bins to the lanes of points"
        used = usage_of(result)
        assert not used.spilled and used.registers <= 128, (kernel.__name__, sizes, used)
        made += 1
print("compiled", made)
"""


def test_the_kernels_compile_for_hopper_and_spill_no_registers(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    assert run_apart(_PROGRAM, tmp_path) == "compiled 35"
