"""Lists: what is done to many tensors of all sizes at once, in one launch of a kernel where kernels can be used.

torch too goes through lists, but gives 65,536 numbers to each block of threads, so that the weights of a small network
keep a few of a GPU's processors busy. Here a program has a chunk of 1,024, and finds it in tables on the device:

```
tensors that lie still   parameters, buffers, averages   their table is made once and kept, since graphs read it
tensors that move        gradients, halves               told to a kernel in its arguments, in a graph as well
```
Nothing waits for the device but the making of a table, which a recording finds there: it follows steps without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from paceline.triton_kernels import cdiv, start_kernel, usable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

    from torch import Tensor

CHUNK = 1024
"""Numbers of a program."""
_WARPS = 4
_NOTED = 128
"""Places that are told in one launch; a kernel takes 4 KB of arguments."""
_ROOMS = (4, 16, 32)
"""Tensors that are converted in one launch: most nodes have up to 16 convolutions, a head has 25."""
_SETTLED = 2048
"""Parts that are added up at once."""
_NOWHERE = 1 << 40
"""A program that does not run."""
_CONVERTED = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Walk:
    """The way through lists whose tensors are cut alike; `list_kernels.py` draws its tables."""

    chunks: Tensor
    tensors: Tensor
    moving: Tensor

    def start(self, kernel: Any, *arguments: Any, **constants: Any) -> None:
        """Launch a kernel on the current stream of the tensors' device, a program for each chunk."""
        with torch.cuda.device_of(self.chunks):
            tables = (self.chunks, self.tensors, self.moving, self.tensors.shape[1])
            start_kernel(
                kernel, (self.chunks.shape[0],), *tables, *arguments, chunk=CHUNK, num_warps=_WARPS, **constants
            )


class Walks:
    """Finds ways through the lists of an owner, and keeps their tables as long as that lives."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        """Take the type of all tensors; others are left to torch."""
        self._dtype = dtype
        self._tables: dict[tuple[int, ...], tuple[Tensor, Tensor] | None] = {}
        """By sizes and places, so that a table is right whenever it is found."""

    def over(self, *still: Sequence[Tensor], moving: Sequence[Tensor] = ()) -> Walk | None:
        """Return the way through lists of equally many tensors; None where torch has to do it.

        still: lists whose tensors do not move. moving: one more list, of such that lie elsewhere each time.
        Tensors of one place in their lists lie alike; kernels take none that are of another type or have gaps.
        """
        first = still[0] if still else moving
        if not first or not usable(first[0].device):
            return None
        if moving and not self._are_alike(first, moving):
            return None
        key = (*(value.numel() for value in first), *(value.data_ptr() for values in still for value in values))
        if key not in self._tables:
            self._tables[key] = _tables(still, first) if all(self._are_alike(first, other) for other in still) else None
        tables = self._tables[key]
        if tables is None:
            return None
        chunks, tensors = tables
        return Walk(chunks=chunks, tensors=tensors, moving=_noted(moving) if moving else tensors)

    def _are_alike(self, first: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
        device = first[0].device
        return all(
            other.dtype is self._dtype
            and other.device == device
            and (other.is_contiguous() or other.is_contiguous(memory_format=torch.channels_last))
            and _lie_alike(one, other)
            for one, other in zip(first, others, strict=True)
        )


def squares(walk: Walk) -> Tensor:
    """Return sums of the squares of all moving tensors, one for each chunk, float32."""
    parts = walk.chunks.new_empty(walk.chunks.shape[0], dtype=torch.float32)
    walk.start(_kernels()._squares, parts)
    return parts


def settle(
    parts: Tensor, images: Tensor, normaliser: Tensor, scale: Tensor, *, share: float, clip: float
) -> tuple[Tensor, Tensor]:
    """Return what gradients have to be multiplied by, and 1.0 where they are not finite, else 0.0; both 0-dim.

    parts: sums of squares of the gradients. images, normaliser: 0-dim, set to 0. The rest is as in `GradientSum`.
    """
    factor, not_finite = parts.new_empty(2).unbind()
    with torch.cuda.device_of(parts):
        given = (parts, images, normaliser, scale, factor, not_finite, parts.shape[0], float(share), float(clip))
        start_kernel(_kernels()._settle, (1,), *given, room=_SETTLED, num_warps=8)
    return factor, not_finite


def multiply(walk: Walk, factor: Tensor) -> None:
    """Multiply all moving tensors by a 0-dim factor."""
    walk.start(_kernels()._multiply, factor)


def descend(walk: Walk, *, lr: Tensor, momentum: Tensor, left_out: Tensor, weight_decay: float, nesterov: bool) -> None:
    """Update by SGD parameters and momentum buffers, which lie still, by moving gradients."""
    walk.start(_kernels()._descend, lr, momentum, left_out, float(weight_decay), nesterov=nesterov)


def adapt(
    walk: Walk,
    steps: Walk,
    *,
    lr: Tensor,
    left_out: Tensor,
    weight_decay: float,
    eps: float,
    betas: tuple[float, float],
) -> None:
    """Count the steps, which have a way of their own; update by AdamW parameters, averages and squares by gradients."""
    steps.start(_kernels()._count, left_out)
    of_betas = [(float(beta), 1.0 - beta, math.log2(beta) if beta else -math.inf) for beta in betas]
    fixed = (float(weight_decay), float(eps), *of_betas[0], *of_betas[1])
    walk.start(_kernels()._adapt, steps.tensors, lr, left_out, *fixed)


def approach(walk: Walk, share: Tensor) -> None:
    """Add to the tensors of the first list a 0-dim share of how far those of the second are away."""
    walk.start(_kernels()._approach, share)


def copy_numbers(walk: Walk) -> None:
    """Copy the int64 tensors of the second list to those of the first."""
    walk.start(_kernels()._copy, kind=_kind(torch.int64))


def by_kernels(values: Tensor) -> bool:
    """Whether kernels may convert such tensors; a backward pass, in another thread, follows what was done forward."""
    return usable(values.device)


def convert(to: Sequence[Tensor], of: Sequence[Tensor], *, kernels: bool) -> None:
    """Copy tensors to such of another type, each made like its own; by kernels, if they may and can."""
    if not (kernels and _can_convert(to, of)):
        torch._foreach_copy_(list(to), list(of))
        return
    kinds = {"to_kind": _kind(to[0].dtype), "of_kind": _kind(of[0].dtype)}
    with torch.cuda.device_of(to[0]):
        for begin in range(0, len(to), _ROOMS[-1]):
            targets, sources = to[begin : begin + _ROOMS[-1]], of[begin : begin + _ROOMS[-1]]
            room = next(room for room in _ROOMS if len(targets) <= room)
            sizes = [value.numel() for value in targets]
            firsts = [0]
            for size in sizes:
                firsts.append(firsts[-1] + cdiv(size, CHUNK))
            told = (
                _words((value.data_ptr() for value in targets), room),
                _words((value.data_ptr() for value in sources), room),
                _words(sizes, room),
                _words(firsts[:-1], room, _NOWHERE),
            )
            start_kernel(_kernels()._convert, (firsts[-1],), *told, room=room, chunk=CHUNK, num_warps=_WARPS, **kinds)


def _can_convert(to: Sequence[Tensor], of: Sequence[Tensor]) -> bool:
    return (
        of[0].dtype in _CONVERTED
        and to[0].dtype in _CONVERTED
        and all(value.dtype is to[0].dtype for value in to)
        and all(value.dtype is of[0].dtype for value in of)
        and all(one.stride() == other.stride() for one, other in zip(to, of, strict=True))
    )


def _lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether tensors of one shape have their numbers in one order."""
    ours, theirs = one.stride(), other.stride()
    return ours == theirs or all(a == b for size, a, b in zip(one.shape, ours, theirs, strict=True) if size != 1)


def _tables(still: Sequence[Sequence[Tensor]], first: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
    """Return the tables of chunks and tensors; None where no tensor has a number."""
    sizes = [value.numel() for value in first]
    chunks = [(nth, begin) for nth, size in enumerate(sizes) for begin in range(0, size, CHUNK)]
    if not chunks:
        return None
    rows = [sizes, *([value.data_ptr() for value in values] for values in still)]
    chunks_table, tensors_table = (torch.tensor(table, device=first[0].device) for table in (chunks, rows))
    return chunks_table, tensors_table


def _noted(moving: Sequence[Tensor]) -> Tensor:
    """Return a table of where tensors lie, written by the device."""
    table = torch.empty(cdiv(len(moving), _NOTED) * _NOTED, dtype=torch.int64, device=moving[0].device)
    with torch.cuda.device_of(table):
        for begin in range(0, len(moving), _NOTED):
            words = _words((value.data_ptr() for value in moving[begin : begin + _NOTED]), _NOTED)
            start_kernel(_kernels()._note, (1,), table, words, begin, room=_NOTED, num_warps=1)
    return table


def _words(numbers: Sequence[int] | Iterator[int], room: int, other: int = 0) -> tuple[int, ...]:
    """Return words for numbers, and for another one to the end of the room; kernels are compiled for none of them."""
    odd = _kernels().WORD + 1
    words = tuple(odd + 2 * number for number in numbers)
    return words + (odd + 2 * other,) * (room - len(words))


def _kind(dtype: torch.dtype) -> Any:
    """Return a type as Triton has it."""
    import triton.language

    return getattr(triton.language, str(dtype).removeprefix("torch."))


def _kernels() -> ModuleType:
    """Return the kernels, which need Triton."""
    from paceline import list_kernels

    return list_kernels
