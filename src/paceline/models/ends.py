r"""Ends: the last convolutions of a head's branches, on GPUs written where their points are joined.

```
branches of a kind   stride 8 ---\                       each on a stream of its own (`beside.py`)
                     stride 16 ---+--- joined points      written in their places by the last convolutions
                     stride 32 --/
```
So no join follows the last branch, and backward each finds its gradient in that of the joined points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from paceline.models.convolution import BiasedConvolution
from paceline.models.joint import STEP, TYPES, is_hooked
from paceline.models.operations.beside import apart, note_made, wait_for
from paceline.triton_kernels import autocast_type, takes_map

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Room:
    """Joined points B A N that the branches of a kind write into."""

    joined: Tensor
    cells: tuple[int, ...]
    """Of an image in each level."""

    def ended(self, branch: nn.Sequential, level: Tensor, place: int) -> Tensor:
        """Take a level BCHW through its branch; return what that has written, B, cells, N."""
        from paceline.models.operations.fused_ends import ended  # which needs Triton

        *parts, end = branch
        for part in parts:
            level = part(level)
        wait_for(self.joined)
        assert isinstance(end, nn.Conv2d)
        assert end.bias is not None
        assert level.shape[2] * level.shape[3] == self.cells[place], "branches keep the size of their level"
        return ended(level, end.weight, end.bias, self.joined, sum(self.cells[:place]))

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the joined points, all pieces of which have been written."""
        found: Tensor = _Joined.apply(self, *pieces)  # type: ignore[no-untyped-call]
        return found


def room_for(branches: Sequence[nn.Sequential], levels: Sequence[Tensor], number: int) -> Room | None:
    """Return where branches may write what they give for these levels; None where torch joins it.

    number: of the stream of the first branch, whose memory it is.
    """
    ends = [branch[-1] for branch in branches]
    dtype = _type_for_kernels(ends, levels)
    if dtype is None or any(map(is_hooked, (*branches, *ends))):  # neither is called, only what is in them
        return None
    cells = tuple(level.shape[2] * level.shape[3] for level in levels)
    with apart(number, levels[0]):
        num_out = len(ends[0].get_parameter("weight"))
        joined = levels[0].new_empty((len(levels[0]), sum(cells), num_out), dtype=dtype)
        note_made(joined)
    return Room(joined=joined, cells=cells)


class _Joined(torch.autograd.Function):
    """The whole of what pieces were written into."""

    @staticmethod
    def forward(ctx: Any, room: Room, *pieces: Tensor) -> Tensor:
        """Return it as it is."""
        ctx.cells = room.cells
        return room.joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_joined: Tensor) -> tuple[Tensor | None, ...]:
        """Parts of it, where they lie."""
        return None, *torch.split(of_joined, ctx.cells, dim=1)


def _type_for_kernels(ends: Sequence[nn.Module], levels: Sequence[Tensor]) -> torch.dtype | None:
    """Return the type that torch would compute in, half precision, in training on a GPU; None where no kernel does."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    if not (all(map(_is_end, ends)) and all(map(takes_map, levels))):
        return None
    weights = [end.weight for end in ends if isinstance(end, nn.Conv2d)]
    kinds = {autocast_type(values) or values.dtype for values in (*weights, *levels)}
    sizes = {(len(weight), weight.device) for weight in weights} | {(len(weights[0]), level.device) for level in levels}
    return kinds.pop() if len(kinds) == len(sizes) == 1 and kinds <= TYPES else None


def _is_end(module: nn.Module) -> bool:
    """Whether it multiplies the channels of each cell by one matrix and adds a bias, does nothing else, and learns."""
    return (
        isinstance(module, nn.Conv2d)
        and type(module) in (nn.Conv2d, BiasedConvolution)  # others may compute anything
        and module.training
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding == (0, 0)
        and module.groups == 1
        and module.bias is not None
        and module.in_channels % STEP == 0
        and module.weight.stride()[:2] == (module.in_channels, 1)
    )
