"""Shared: a map that several take, the gradients of which are added up where they are read.

Autograd adds the gradients of a map that is used several times one to the other, a pass over three maps each time. The
backward pass of a fused norm reads the gradient of its result anyway, so it can read several in place of one:

```
forward     norm --- x --- aliases ---+--- first use          backward     norm  <-- the first --  aliases  <-- y1'
                                      +--- second use                       ^                         |     <-- y2'
                                                                            +------ left with it -----+
```
What comes to the aliases is left with the node that made the map, but for the first, which goes the usual way. So a sum
is right also where some take the map itself: autograd adds theirs to that one.

Streams: the first comes to the maker from the aliases, which came after all that they were given. So autograd lets the
maker's stream wait for whatever was left with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import BackwardCFunction, once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

MOST = 4
"""Gradients of a result that come to its maker, the one that autograd brings among them."""


class Gathering(torch.autograd.Function):
    """An operation that adds up the gradients of its results itself: its node has a `left` of `Left`."""


class Left:
    """Gradients that were left with a node, in the backward pass that goes on.

    None lasts longer than its pass, whether that came to its end or not.
    """

    def __init__(self, num_results: int) -> None:
        self._pass = -1
        self._gradients: list[list[Tensor]] = [[] for _ in range(num_results)]

    def leave(self, result: int, gradients: list[Tensor]) -> None:
        """Leave some of a result, by its number."""
        now = torch._C._current_graph_task_id()
        if now != self._pass:
            self.take()
            self._pass = now
        mine = self._gradients[result]
        for gradient in gradients:
            if len(mine) + 1 < MOST:
                mine.append(gradient)
            else:
                mine[-1] = mine[-1] + gradient

    def take(self) -> list[list[Tensor]]:
        """Return those of each result, and hold none of them from now on."""
        found, self._gradients = self._gradients, [[] for _ in self._gradients]
        if self._pass != torch._C._current_graph_task_id():
            return [[] for _ in found]
        for gradient in (gradient for gradients in found for gradient in gradients):
            if gradient.is_cuda:
                gradient.record_stream(torch.cuda.current_stream(gradient.device))  # it may be another one's memory
        return found


class _Aliases(torch.autograd.Function):
    """A map under several names."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Left, result: int, uses: int) -> tuple[Tensor, ...]:
        """Return x this often."""
        ctx.set_materialize_grads(False)
        ctx.left, ctx.result = left, result
        return tuple(x.detach() for _ in range(uses))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Hand on the first gradient that there is."""
        there = [gradient for gradient in gradients if gradient is not None]
        if len(there) > 1:
            ctx.left.leave(ctx.result, there[1:])
        return there[0] if there else None, None, None, None


def shared(x: Tensor, uses: int) -> tuple[Tensor, ...]:
    """Return a map for each of its uses, so that their gradients are added up by what has made it.

    Where that cannot do it, or nothing is differentiated, all are x. A hook on x sees the gradient of the first use
    alone, as does `torch.autograd.grad` of x; and what ends before it comes to the maker has no whole gradient.
    """
    found = None if torch.compiler.is_compiling() else _left_of(x)
    if found is None:
        return (x,) * uses
    aliases: tuple[Tensor, ...] = _Aliases.apply(x, *found, uses)  # type: ignore[no-untyped-call]
    return aliases


def _left_of(x: Tensor) -> tuple[Left, int] | None:
    """Return where gradients of x may be left, and the number of the result that x is there."""
    node: Any = x.grad_fn
    if not (issubclass(type(node), BackwardCFunction) and torch.is_grad_enabled()):
        return None
    if issubclass(node._forward_cls, Gathering):
        return node.left, x.output_nr
    return (node.left, node.result) if node._forward_cls is _Aliases else None
