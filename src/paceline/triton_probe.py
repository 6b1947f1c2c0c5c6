"""Probe: the smallest kernel, which tells whether Triton works."""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor


def increment(value: Tensor) -> None:
    """Add one to a tensor of one number, in place."""
    _increment[(1,)](value)


@triton.jit
def _increment(value):
    tl.store(value, tl.load(value) + 1)
