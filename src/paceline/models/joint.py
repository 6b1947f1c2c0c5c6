"""Joint convolutions: over several maps as if they were joined along their channels, on GPUs without joining them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from paceline.models.convolution import Convolution
from paceline.models.stem import StemConvolution
from paceline.triton_kernels import autocast_type, usable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from paceline.models.operations.moments import Tally

STEP = 8
"""What the channels of every map have to be a multiple of: as many are loaded at once."""
TYPES = frozenset({torch.bfloat16, torch.float16})
"""In which kernels compute; float32 is left to cuDNN, which has its own way of rounding it."""


def convolved_jointly(convolution: nn.Conv2d, maps: Sequence[Tensor], tally: Tally | None = None) -> Tensor:
    """Convolve maps BCHW, of one B, H and W, as if they were joined along their channels.

    tally: takes the moments of the result, where a kernel sums them up on the way.
    """
    dtype = type_for_kernels(convolution, maps) if len(maps) > 1 else None
    if dtype is None:
        knows = type(convolution) in (Convolution, StemConvolution) and not is_watched(convolution)
        told = {"tally": tally} if tally and knows else {}
        found: Tensor = convolution(maps[0] if len(maps) == 1 else torch.cat(tuple(maps), dim=1), **told)
        return found
    from paceline.models.operations.fused_joint import convolved  # which needs Triton

    return convolved(convolution.weight, maps, dtype, tally=tally)


def is_watched(module: nn.Module) -> bool:
    """Whether a hook may give another result than the module has, of unknown moments, or sees its gradient."""
    everywhere = nn.modules.module
    return any(
        (
            module._forward_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
            everywhere._global_forward_hooks,
            everywhere._global_backward_hooks,
            everywhere._global_backward_pre_hooks,
        )
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether something is to happen when it is called, or sees what comes or goes there."""
    return is_watched(module) or bool(module._forward_pre_hooks or nn.modules.module._global_forward_pre_hooks)


def type_for_kernels(convolution: nn.Conv2d, pieces: Sequence[Tensor]) -> torch.dtype | None:
    """Return the type in which kernels convolve maps BCHW as if they were joined; None where that is left to torch.

    It is the one that torch would compute in: half precision, in training, on a GPU.
    """
    if not (convolution.training and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return None
    device = pieces[0].device
    is_open = _is_product(convolution) and not is_hooked(convolution)  # since it is not called
    if not (usable(device) and is_open and all(_lies_well(piece) for piece in pieces)):
        return None
    sizes = {(piece.shape[0], *piece.shape[2:], piece.device) for piece in pieces}
    if len(sizes) > 1 or sum(piece.shape[1] for piece in pieces) != convolution.in_channels:
        return None  # torch says what is wrong
    kinds = {autocast_type(values) or values.dtype for values in (convolution.weight, *pieces)}
    return kinds.pop() if len(kinds) == 1 and kinds <= TYPES else None


def _is_product(convolution: nn.Conv2d) -> bool:
    """Whether it multiplies the channels of each cell by one matrix, and does nothing else."""
    return (
        type(convolution) in (nn.Conv2d, Convolution)  # others may compute anything
        and convolution.kernel_size == (1, 1)
        and convolution.stride == (1, 1)
        and convolution.padding == (0, 0)
        and convolution.groups == 1
        and convolution.bias is None
        and convolution.out_channels % STEP == 0
        and convolution.weight.stride()[:2] == (convolution.in_channels, 1)
    )


def _lies_well(piece: Tensor) -> bool:
    """Whether the channels of a map lie beside each other, and in whole steps."""
    return piece.shape[1] % STEP == 0 and piece.stride(1) == 1 and piece.numel() > 0
