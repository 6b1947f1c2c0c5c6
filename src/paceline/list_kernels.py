"""List kernels: what is done to many tensors of all sizes in one launch each, by Triton.

A program takes one chunk of one tensor. Which, and where the tensors lie, it reads from tables of int64:

```
chunks    C x 2         of each chunk: the tensor, and the first of its numbers there
tensors   (1 + L) x T   of each tensor: how many numbers it has, then where it lies, for each of L lists
moving    T or more     where the tensors lie of one more list, which is another one each time
```
`lists.py` makes them and launches. Sums are float32 and added in one order. This module needs Triton; nothing imports
it before that is known to work.
"""

from __future__ import annotations

import triton
import triton.language as tl

WORD = 1 << 62
"""Of a word that stands for a number: WORD + 2 number + 1. Triton compiles anew for numbers of another length and for
multiples of 16; words are all as long, and odd."""
_WORD = tl.constexpr(WORD)


@triton.jit
def _number(word):
    """Return what a word stands for."""
    return (word - _WORD) >> 1


@triton.jit(do_not_specialize=("first",))
def _note(moving, words, first, room: tl.constexpr):
    """Write numbers to a table, from a place on."""
    for nth in tl.static_range(room):
        tl.store(moving + first + nth, _number(words[nth]))


@triton.jit
def _piece(chunks, tensors, chunk: tl.constexpr):
    """Return the tensor of this program's chunk, its first number there, and which lanes have one."""
    tensor = tl.load(chunks + 2 * tl.program_id(0))
    begin = tl.load(chunks + 2 * tl.program_id(0) + 1)
    inside = tl.arange(0, chunk) < tl.load(tensors + tensor) - begin
    return tensor, begin, inside


@triton.jit
def _lanes(place, begin, chunk: tl.constexpr, kind: tl.constexpr = tl.float32):
    """Where numbers from `begin` on lie of the tensor whose place is in a table."""
    return tl.load(place).to(tl.pointer_type(kind)) + begin + tl.arange(0, chunk)


@triton.jit(do_not_specialize=("num_tensors",))
def _squares(chunks, tensors, moving, num_tensors, parts, chunk: tl.constexpr):
    """Sum of the squares of each chunk."""
    tensor, begin, inside = _piece(chunks, tensors, chunk)
    value = tl.load(_lanes(moving + tensor, begin, chunk), mask=inside, other=0)
    tl.store(parts + tl.program_id(0), tl.sum(value * value, axis=0))


@triton.jit(do_not_specialize=("num_parts", "images", "normaliser", "scale", "factor", "not_finite"))
def _settle(parts, images, normaliser, scale, factor, not_finite, num_parts, share, clip, room: tl.constexpr):
    """From sums of squares, what gradients are to be multiplied by, and 1 where that is no number; see `GradientSum`.

    Comparisons are such that what is no number stays none. What was counted starts anew.
    """
    lane = tl.arange(0, room)
    total = tl.full((room,), 0.0, tl.float32)
    for first in range(0, num_parts, room):
        total += tl.load(parts + first + lane, mask=first + lane < num_parts, other=0)
    divisor = tl.load(normaliser)
    divisor = tl.where(divisor < 1, 1.0, divisor) * tl.load(scale) * share
    by = tl.load(images) / divisor
    norm = tl.sqrt(tl.sum(total, axis=0)) * by
    tl.store(not_finite, tl.where(tl.abs(norm) < float("inf"), 0.0, 1.0))
    if clip > 0:
        less = clip / (norm + 1e-6)
        by *= tl.where(less > 1, 1.0, less)
    tl.store(factor, by)
    tl.store(images, 0.0)
    tl.store(normaliser, 0.0)


@triton.jit(do_not_specialize=("num_tensors", "factor"))
def _multiply(chunks, tensors, moving, num_tensors, factor, chunk: tl.constexpr):
    """Multiply all by a factor, in place."""
    tensor, begin, inside = _piece(chunks, tensors, chunk)
    lanes = _lanes(moving + tensor, begin, chunk)
    tl.store(lanes, tl.load(lanes, mask=inside, other=0) * tl.load(factor), mask=inside)


@triton.jit(do_not_specialize=("num_tensors", "lr", "momentum", "left_out"))
def _descend(
    chunks,
    tensors,
    moving,
    num_tensors,
    lr,
    momentum,
    left_out,
    weight_decay,
    nesterov: tl.constexpr,
    chunk: tl.constexpr,
):
    """Update by SGD parameters and buffers by gradients, as in `training/sgd.py`; not where it is left out."""
    if tl.load(left_out) == 0:
        tensor, begin, inside = _piece(chunks, tensors, chunk)
        parameters = _lanes(tensors + num_tensors + tensor, begin, chunk)
        buffers = _lanes(tensors + 2 * num_tensors + tensor, begin, chunk)
        rate, kept = tl.load(lr), tl.load(momentum)
        value = tl.load(parameters, mask=inside, other=0)
        gradient = tl.load(_lanes(moving + tensor, begin, chunk), mask=inside, other=0) + weight_decay * value
        buffer = kept * tl.load(buffers, mask=inside, other=0) + gradient
        if nesterov:
            value -= rate * kept * buffer
            value -= rate * gradient
        else:
            value -= rate * buffer
        tl.store(buffers, buffer, mask=inside)
        tl.store(parameters, value, mask=inside)


@triton.jit(do_not_specialize=("num_tensors", "left_out"))
def _count(chunks, tensors, moving, num_tensors, left_out, chunk: tl.constexpr):
    """Add 1 to all, or nothing where an update is left out."""
    tensor, begin, inside = _piece(chunks, tensors, chunk)
    lanes = _lanes(tensors + num_tensors + tensor, begin, chunk)
    tl.store(lanes, tl.load(lanes, mask=inside, other=0) + (1 - tl.load(left_out)), mask=inside)


@triton.jit(do_not_specialize=("num_tensors", "lr", "left_out"))
def _adapt(
    chunks,
    tensors,
    moving,
    num_tensors,
    steps,
    lr,
    left_out,
    weight_decay,
    eps,
    beta1,
    rest1,
    log2_beta1,
    beta2,
    rest2,
    log2_beta2,
    chunk: tl.constexpr,
):
    """Update by AdamW parameters, averages and squares by gradients; not where it is left out.

    steps: such a table of tensors, of those that have counted this update. rest1, rest2: 1 less each beta.
    """
    if tl.load(left_out) == 0:
        tensor, begin, inside = _piece(chunks, tensors, chunk)
        parameters = _lanes(tensors + num_tensors + tensor, begin, chunk)
        averages = _lanes(tensors + 2 * num_tensors + tensor, begin, chunk)
        squares = _lanes(tensors + 3 * num_tensors + tensor, begin, chunk)
        step = tl.load(tl.load(steps + num_tensors + tensor).to(tl.pointer_type(tl.float32)))
        rate = tl.load(lr)
        # In double precision: they are differences of almost equal numbers at first.
        correction1 = (1 - tl.exp2((step * log2_beta1).to(tl.float64))).to(tl.float32)
        correction2 = (1 - tl.exp2((step * log2_beta2).to(tl.float64))).to(tl.float32)
        gradient = tl.load(_lanes(moving + tensor, begin, chunk), mask=inside, other=0)
        value = tl.load(parameters, mask=inside, other=0)
        average = beta1 * tl.load(averages, mask=inside, other=0) + rest1 * gradient
        square = beta2 * tl.load(squares, mask=inside, other=0) + rest2 * gradient * gradient
        value -= rate * weight_decay * value
        value -= rate / correction1 * average / (tl.sqrt(square) / tl.sqrt(correction2) + eps)
        tl.store(averages, average, mask=inside)
        tl.store(squares, square, mask=inside)
        tl.store(parameters, value, mask=inside)


@triton.jit(do_not_specialize=("num_tensors", "share"))
def _approach(chunks, tensors, moving, num_tensors, share, chunk: tl.constexpr):
    """Let the tensors of one list come nearer to those of another by a share of the way."""
    tensor, begin, inside = _piece(chunks, tensors, chunk)
    averages = _lanes(tensors + num_tensors + tensor, begin, chunk)
    values = _lanes(tensors + 2 * num_tensors + tensor, begin, chunk)
    average = tl.load(averages, mask=inside, other=0)
    average += tl.load(share) * (tl.load(values, mask=inside, other=0) - average)
    tl.store(averages, average, mask=inside)


@triton.jit(do_not_specialize=("num_tensors",))
def _copy(chunks, tensors, moving, num_tensors, kind: tl.constexpr, chunk: tl.constexpr):
    """Copy the tensors of one list to those of another."""
    tensor, begin, inside = _piece(chunks, tensors, chunk)
    to = _lanes(tensors + num_tensors + tensor, begin, chunk, kind)
    tl.store(to, tl.load(_lanes(tensors + 2 * num_tensors + tensor, begin, chunk, kind), mask=inside), mask=inside)


@triton.jit
def _convert(
    to,
    of,
    sizes,
    firsts,
    room: tl.constexpr,
    to_kind: tl.constexpr,
    of_kind: tl.constexpr,
    chunk: tl.constexpr,
):
    """Round tensors to another type. All that is told of them is words, `room` of each kind.

    firsts: the program with which each tensor begins; of those that are not there, one that does not run.
    """
    here = _WORD + 2 * tl.program_id(0).to(tl.int64) + 1
    target, source, size, first = to[0], of[0], sizes[0], firsts[0]
    for nth in tl.static_range(1, room):
        beyond = here >= firsts[nth]
        target = tl.where(beyond, to[nth], target)
        source = tl.where(beyond, of[nth], source)
        size = tl.where(beyond, sizes[nth], size)
        first = tl.where(beyond, firsts[nth], first)
    begin = ((here - first) >> 1) * chunk
    lane = tl.arange(0, chunk)
    inside = lane < _number(size) - begin
    value = tl.load(_number(source).to(tl.pointer_type(of_kind)) + begin + lane, mask=inside, other=0)
    tl.store(_number(target).to(tl.pointer_type(to_kind)) + begin + lane, value.to(to_kind), mask=inside)
