"""Turns: how the programs of a kernel share a map, by Triton.

Each program has every so-manieth piece of it, so that all are at one place of the map together, in a part of the memory
and of the cache, and none has more than one piece more to do. This module needs Triton; nothing imports it before that
is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _num_turns(part, parts, pieces):
    """How many of the pieces a part of them has; there are no more parts than pieces."""
    return (pieces - part + parts - 1) // parts


@triton.jit
def _piece(turn, part, parts):
    """Which piece is at a part's turn."""
    return turn * parts + part


@triton.jit
def _num_rows_of(part, parts, pieces, num_rows, rows: tl.constexpr):
    """How many rows a part has, if pieces are `rows` each and the last has what is left."""
    mine = _num_turns(part, parts, pieces) * rows
    return tl.where(part == (pieces - 1) % parts, mine - (pieces * rows - num_rows), mine)
