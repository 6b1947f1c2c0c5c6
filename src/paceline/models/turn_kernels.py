"""Turns: how the programs of a kernel share a map that is too large for the cache, by Triton.

What was read or written last is in the cache still: the end of a map, if the kernel before went through it from the
beginning. A sum may begin where that kernel has ended, and the next kernel at the beginning, where the sum has ended:

```
convolution     ------------------------>    writes a map, whose end is left in the cache
sum             <------------------------    finds the end, and leaves the beginning
result          ------------------------>    finds the beginning
```
For that all programs of a sum have to be at one place of the map together, so each has every so-manieth piece of it
and not so many in a row. This module needs Triton; nothing imports it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _num_turns(part, parts, pieces):
    """How many of the pieces a part of them has; there are no more parts than pieces."""
    return (pieces - part + parts - 1) // parts


@triton.jit
def _piece(turn, part, parts, pieces, backwards: tl.constexpr):
    """Which piece is at a part's turn; the last one is at the first turn, if `backwards`."""
    piece = turn * parts + part
    if backwards:
        piece = pieces - 1 - piece
    return piece


@triton.jit
def _num_rows_of(part, parts, pieces, num_rows, rows: tl.constexpr, backwards: tl.constexpr):
    """How many rows a part has, if pieces are `rows` each and the last has what is left."""
    mine = _num_turns(part, parts, pieces) * rows
    last = pieces - 1
    owner = 0 if backwards else last % parts
    return tl.where(part == owner, mine - (pieces * rows - num_rows), mine)
