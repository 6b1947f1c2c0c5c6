"""Parted convolution: torch's, whose two gradients are computed apart, that of the weights beside the other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paceline.models.operations.beside import beside

if TYPE_CHECKING:
    from torch import Tensor, nn

Settings = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], bool, tuple[int, ...], int]
"""Stride, padding, dilation, whether it is transposed, padding of the result, groups."""


def gradients_apart(
    of_y: Tensor, x: Tensor, weight: Tensor, settings: Settings, wanted: tuple[bool, bool], *, joins: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of x and of the weights, that of the weights computed beside what follows if it `joins`."""
    of_x = of_weight = None
    if all(wanted) and x.is_contiguous(memory_format=torch.channels_last):
        of_y = of_y.contiguous(memory_format=torch.channels_last)  # as either would, each for itself
    if wanted[1]:
        with beside(of_y, x, weight, joins=joins):
            _, of_weight, _ = torch.ops.aten.convolution_backward(
                of_y, x, weight, None, *settings, [False, True, False]
            )
    if wanted[0]:
        of_x, _, _ = torch.ops.aten.convolution_backward(of_y, x, weight, None, *settings, [True, False, False])
    return of_x, of_weight


class _Convolved(torch.autograd.Function):
    """A convolution without bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, settings: Settings) -> Tensor:
        """Return y of the type of x and weight."""
        ctx.save_for_backward(x, weight)
        ctx.settings = settings
        stride, padding, dilation, _, _, groups = settings
        return F.conv2d(x, weight, None, stride, padding, dilation, groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and weight, which joins the others of its node."""
        x, weight = ctx.saved_tensors
        return *gradients_apart(of_y, x, weight, ctx.settings, ctx.needs_input_grad[:2], joins=True), None


def convolved(x: Tensor, half: Tensor, convolution: nn.Conv2d) -> Tensor:
    """Convolve BCHW on a GPU as `convolution`, which has no bias, would by torch, with the copy of its weight."""
    assert convolution.bias is None
    assert convolution.padding_mode == "zeros"
    assert not isinstance(convolution.padding, str)
    settings: Settings = (
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        False,
        (0, 0),
        convolution.groups,
    )
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # a backward pass is in a thread of the device
        y: Tensor = _Convolved.apply(x.to(half.dtype), half, settings)  # type: ignore[no-untyped-call]
    return y
