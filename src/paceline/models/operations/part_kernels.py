"""Part kernel: the parts of a weight's gradient added up, by Triton.

Programs that share the cells of a map write what they have summed, in float32, one after the other; this adds it, in
one order, so that the same input gives the same bits. The module needs Triton; nothing imports it before that is known
to work.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("num_weights", "num_parts"))
def _settle_weight(parts, of_weight, num_weights, num_parts, at_once: tl.constexpr, weights: tl.constexpr):
    """Add the parts of the gradient of `weights` weights, `at_once` side by side."""
    weight = tl.program_id(0) * weights + tl.arange(0, weights)
    total = tl.full((at_once, weights), 0.0, tl.float32)
    for first in range(0, num_parts, at_once):
        part = first + tl.arange(0, at_once)
        inside = (part < num_parts)[:, None] & (weight < num_weights)[None, :]
        total += tl.load(parts + part.to(tl.int64)[:, None] * num_weights + weight[None, :], mask=inside, other=0)
    value = tl.sum(total, axis=0)
    tl.store(of_weight + weight, value.to(of_weight.dtype.element_ty), mask=weight < num_weights)
