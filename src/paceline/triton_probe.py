"""Probe: the smallest kernel, which tells whether Triton works, and whether kernels may come early."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from paceline.triton_overlap import await_previous

if TYPE_CHECKING:
    from torch import Tensor

_LINKS = 64
"""Of a chain, each of which needs what the one before has written."""


def increment(value: Tensor) -> None:
    """Add one to a tensor of one number, in place."""
    _increment[(1,)](value)


def chain_holds(value: Tensor) -> bool:
    """Whether early kernels each see what was written before them: launched, and as a graph.

    value: one number on the current device, which is changed. Waits for the device.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _count(value)
        launched = float(value)
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            _count(value)
        finally:
            graph.capture_end()
        graph.replay()
        replayed = float(value)
    return launched == replayed == 2 * _LINKS + 1


def _count(value: Tensor) -> None:
    """Count by early kernels, first after memory is set, which no kernel does, then after a kernel of torch's."""
    value.zero_()
    _increment_early(value)
    value.add_(1)
    _increment_early(value)


def _increment_early(value: Tensor) -> None:
    for _ in range(_LINKS):
        _increment[(1,)](value, early=True, launch_pdl=True)


@triton.jit
def _increment(value, early: tl.constexpr = False):
    await_previous(early)
    tl.store(value, tl.load(value) + 1)
