"""Half weights: the weights of a node in the type that autocast computes in, made together, and their gradients too.

Autocast rounds each weight by itself when a layer asks for it, and makes each gradient float32 by itself: two small
kernels for each convolution. While a node runs inside of `halved`, its convolutions find copies that one operation has
made, and one operation gives all their gradients back:

```
weights of a node   --- one copy --->   halves   --- each convolution takes its own --->   results
their gradients     <-- one copy ----   those of the halves
```
The numbers are autocast's, to the bit. Kernels that sum a weight's gradient in float32 give it to the weight as it is,
by the same way: `whole_of`. So all gradients of a node's weights meet here, and may have been computed beside the rest
until then (`beside.py`). It goes by nodes where gradients travel between ranks as they come; where none travel, the
engine lets the whole network be the node, and nothing waits for the gradient of a weight before the backward pass ends.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from paceline.lists import by_kernels, convert
from paceline.models.operations.beside import rejoin
from paceline.triton_kernels import autocast_type, on_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor


@dataclass(frozen=True)
class _Held:
    """What a node holds of a weight."""

    half: Tensor
    whole: Tensor | None
    """The weight itself, whose gradient goes where that of the copy does; for kernels alone, so on GPUs."""


_halves: ContextVar[Mapping[int, _Held]] = ContextVar("_halves")
"""By the `id` of the weight, of the node that runs or the whole network, which uses it once.

What is taken from here in place of a weight brings its gradient to those of the others, where it is waited for before
anything reads it. Nothing waits for the gradient of a weight that is taken as it is.
"""


class OfParts(nn.Module):
    """A node of parts that may each be on a stream of its own."""


def halved(node: nn.Module) -> AbstractContextManager[None]:
    """Let the convolutions of a node find copies of their weights; nothing but in training under autocast.

    node: a network, or one of its nodes where that has not been done for the network. On a GPU a node that is `OfParts`
    does it itself, by `halved_apart`.
    """
    if not (node.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return nullcontext()
    found = _weights_of(node)
    first = next(found, None)
    if first is None or id(first) in _halves.get({}):  # the network holds it, and so all of the node's
        return nullcontext()
    dtype = autocast_type(first)
    if dtype is None or (isinstance(node, OfParts) and on_gpu(first)):
        return nullcontext()
    return _held([first, *found], dtype)


def halved_apart(part: nn.Module, x: Tensor) -> AbstractContextManager[None]:
    """Do it for a part of a node that takes x and may be on a stream of its own; nothing but on GPUs."""
    return halved(part) if on_gpu(x) else nullcontext()


def half_of(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the copy of a weight of this type, which takes the gradient in its place; without one, the weight."""
    held = _halves.get({}).get(id(weight))
    return held.half if held is not None and held.half.dtype == dtype else weight


def numbers_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in a type, for those who give its gradient to `whole_of` it."""
    return half_of(weight, dtype).detach().to(dtype)


def whole_of(weight: Tensor) -> Tensor:
    """Return what takes the gradient of a weight, as it is, in its place; the weight where the node holds none."""
    held = _halves.get({}).get(id(weight))
    return weight if held is None or held.whole is None else held.whole


@contextmanager
def _held(weights: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    outputs: tuple[Tensor, ...] = _Halved.apply(dtype, on_gpu(weights[0]), *weights)  # type: ignore[no-untyped-call]
    halves, wholes = outputs[: len(weights)], outputs[len(weights) :] or [None] * len(weights)
    held = {id(weight): _Held(half, whole) for weight, half, whole in zip(weights, halves, wholes, strict=True)}
    token = _halves.set({**_halves.get({}), **held})
    try:
        yield
    finally:
        _halves.reset(token)


def _weights_of(node: nn.Module) -> Iterator[Tensor]:
    """Find what is trained of a node's convolutions, on GPUs biases too, but for what is compiled."""
    if _is_compiled(node):
        return
    if isinstance(node, nn.Conv2d):
        if _is_plain(node.weight):
            yield node.weight
        if node.bias is not None and _is_plain(node.bias) and on_gpu(node.bias):  # which a kernel sums beside the other
            yield node.bias
    for child in node.children():
        yield from _weights_of(child)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is trained, and not a shard of something."""
    return type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32


def _is_compiled(node: nn.Module) -> bool:
    return node._compiled_call_impl is not None


class _Halved(torch.autograd.Function):
    """Copies of tensors in another type, all by one operation, and the tensors themselves."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, gives_wholes: bool, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return copies laid out like the weights, then the weights, if asked for."""
        ctx.set_materialize_grads(False)
        ctx.num_weights = len(weights)
        ctx.device, ctx.kernels = weights[0].device, by_kernels(weights[0])
        halves = _converted(weights, dtype, kernels=ctx.kernels)
        if not gives_wholes:
            return halves
        ctx.save_for_backward(*halves)  # only to be held: other streams read what is of this one's memory
        return (*halves, *(weight.detach() for weight in weights))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in float32, of which any may have been computed beside what came before."""
        rejoin(ctx.device, [gradient for gradient in gradients if gradient is not None])
        of_halves, of_wholes = gradients[: ctx.num_weights], gradients[ctx.num_weights :]
        there = [gradient for gradient in of_halves if gradient is not None]
        found = iter(_converted(there, torch.float32, kernels=ctx.kernels))
        rounded = [None if gradient is None else next(found) for gradient in of_halves]
        return None, None, *(map(_sum_of, rounded, of_wholes) if of_wholes else rounded)


def _sum_of(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype, *, kernels: bool) -> tuple[Tensor, ...]:
    converted = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    if converted:
        convert(converted, tensors, kernels=kernels)
    return converted
