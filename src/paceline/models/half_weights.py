"""Half weights: the weights of a node in the type that autocast computes in, made together, and their gradients too.

Autocast rounds each weight by itself when a layer asks for it, and makes each gradient float32 by itself: two small
kernels for each convolution. While a node runs inside of `halved`, its convolutions find copies that one operation has
made, and one operation gives all their gradients back:

```
weights of a node   --- one copy --->   halves   --- each convolution takes its own --->   results
their gradients     <-- one copy ----   those of the halves
```
The numbers are autocast's, to the bit. It goes by nodes since gradients travel between ranks as they come.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from paceline.triton_kernels import autocast_type

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import Tensor

_halves: ContextVar[Mapping[int, Tensor]] = ContextVar("_halves")
"""Copies by the `id` of the weight, which the node that runs holds."""


def halved(node: nn.Module) -> AbstractContextManager[None]:
    """Let the convolutions of a node find copies of their weights; nothing but in training under autocast."""
    if not (node.training and torch.is_grad_enabled()) or torch.compiler.is_compiling() or _is_compiled(node):
        return nullcontext()
    weights = [module.weight for module in node.modules() if isinstance(module, nn.Conv2d) and _is_plain(module.weight)]
    dtype = autocast_type(weights[0]) if weights else None
    return nullcontext() if dtype is None else _held(weights, dtype)


def half_of(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return the copy of a weight of this type, which takes the gradient in its place; without one, the weight."""
    held = _halves.get({}).get(id(weight))
    return held if held is not None and held.dtype == dtype else weight


def numbers_of(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a weight in a type, for those who give its gradient to the weight itself."""
    return half_of(weight, dtype).detach().to(dtype)


@contextmanager
def _held(weights: Sequence[Tensor], dtype: torch.dtype) -> Iterator[None]:
    copies: tuple[Tensor, ...] = _Halved.apply(dtype, *weights)  # type: ignore[no-untyped-call]
    token = _halves.set({id(weight): copy for weight, copy in zip(weights, copies, strict=True)})
    try:
        yield
    finally:
        _halves.reset(token)


def _is_plain(weight: Tensor) -> bool:
    """Whether it is trained, and not a shard of something."""
    return type(weight) is nn.Parameter and weight.requires_grad and weight.dtype == torch.float32


def _is_compiled(node: nn.Module) -> bool:
    return node._compiled_call_impl is not None


class _Halved(torch.autograd.Function):
    """Copies of tensors in another type, all by one operation."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        """Return copies laid out like the weights."""
        ctx.set_materialize_grads(False)
        return _converted(weights, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients in float32; None for copies whose gradient has gone to the weight itself."""
        there = [gradient for gradient in gradients if gradient is not None]
        found = iter(_converted(there, torch.float32))
        return None, *(None if gradient is None else next(found) for gradient in gradients)


def _converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    converted = tuple(torch.empty_like(tensor, dtype=dtype) for tensor in tensors)
    if converted:
        torch._foreach_copy_(converted, tuple(tensors))
    return converted
