"""Compiled norm: batch norm in training and the activation after it as one differentiable operation, on a CPU.

What `fused_norm` is on GPUs. Only the input is kept for the backward pass, which computes the activation's slope anew.
In evaluation, where norms are part of their convolutions, the activation alone.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.pitch import readable
from paceline.native import norm
from paceline.native.norm import Cells
from paceline.triton_kernels import are_left_out

if TYPE_CHECKING:
    import ctypes

    from torch import Tensor

TYPES = (torch.float32, torch.bfloat16)


def kernels_for(x: Tensor) -> ctypes.CDLL | None:
    """Return the compiled code where it takes such a map, and can have the threads that torch has."""
    suits = (
        x.device.type == "cpu"
        and x.dtype in TYPES
        and not are_left_out()
        and (norm.team() is not None or torch.get_num_threads() == 1)
    )
    return norm.kernels() if suits else None


class _NormedAndActivated(torch.autograd.Function):
    """z = activation(batch norm(x)) + carried, whole or in pieces."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        carried: Tensor | None,
        latest: tuple[Tensor, Tensor],
        eps: float,
        silu: bool,
        pieces: int,
        kernels: ctypes.CDLL,
    ) -> tuple[Tensor, ...]:
        """Return z."""
        batch, channels, height, width = x.shape
        kept = weight.new_empty((2, channels))
        shape = (batch, channels // pieces, height, width)
        z = [torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last) for _ in range(pieces)]
        mean, variance = latest
        beside = None
        if carried is not None:
            carried, pitch = readable(carried)
            beside = carried.data_ptr(), pitch
        places = tuple((piece.data_ptr(), channels // pieces) for piece in z)
        cells = _cells(x, weight, bias, kept, places, silu=silu)
        norm.forward(kernels, cells, eps=eps, of_mean=mean.data_ptr(), of_variance=variance.data_ptr(), carried=beside)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.silu, ctx.kernels = silu, kernels
        return tuple(z)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, weight and bias."""
        x, weight, bias, kept = ctx.saved_tensors
        found = [readable(gradient.to(x.dtype)) for gradient in gradients]
        places = tuple((gradient.data_ptr(), pitch) for gradient, pitch in found)
        of_x = torch.empty_like(x, memory_format=torch.channels_last)
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        cells = _cells(x, weight, bias, kept, places, silu=ctx.silu)
        norm.backward(
            ctx.kernels,
            cells,
            of_x=of_x.data_ptr(),
            of_weight=of_weight.data_ptr(),
            of_bias=of_bias.data_ptr(),
        )
        of_carried = gradients[0] if ctx.needs_input_grad[3] else None
        return of_x, of_weight, of_bias, of_carried, *[None] * 5


def _cells(
    x: Tensor, weight: Tensor, bias: Tensor, kept: Tensor, places: tuple[tuple[int, int], ...], *, silu: bool
) -> Cells:
    channels = x.shape[1]
    return Cells(
        rows=x.numel() // channels,
        channels=channels,
        is_half=x.dtype == torch.bfloat16,
        is_silu=silu,
        threads=torch.get_num_threads(),
        x=x.data_ptr(),
        z=places,
        weight=weight.data_ptr(),
        bias=bias.data_ptr(),
        mean=kept.data_ptr(),
        inverse=kept.data_ptr() + kept.element_size() * channels,
    )


@functools.cache
def _nothing(channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight C, bias C, and mean and inverse 2C, of a norm that changes nothing."""
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    return ones, zeros, torch.stack((zeros, ones))


def activated_in_place(
    x: Tensor, kernels: ctypes.CDLL, *, pieces: int = 1, carried: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Give SiLU(x) + carried where nothing is differentiated; a whole result is written over x.

    x: BCHW as `kernels_for` asks, channels-last, not empty. pieces: 1, or 2 where the channels are even. carried: BCHW
    of x's type. Returns the result, or its pieces along the channels, each contiguous and channels-last.
    """
    batch, channels, height, width = x.shape
    z = [x]
    if pieces > 1:
        shape = (batch, channels // pieces, height, width)
        z = [torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last) for _ in range(pieces)]
    beside = None
    if carried is not None:
        carried, pitch = readable(carried)
        beside = carried.data_ptr(), pitch
    with torch.inference_mode(mode=False):
        weight, bias, kept = _nothing(channels)
    places = tuple((piece.data_ptr(), channels // pieces) for piece in z)
    norm.apply(kernels, _cells(x, weight, bias, kept, places, silu=True), carried=beside)
    return tuple(z)


def normed_and_activated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    latest: tuple[Tensor, Tensor],
    kernels: ctypes.CDLL,
    *,
    eps: float,
    silu: bool,
    pieces: int = 1,
    carried: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Normalise BCHW by its own statistics and activate it.

    x: as `kernels_for` asks, channels-last, more than one value per channel. weight, bias: C, float32, contiguous.
    latest: C each, float32; take the mean and the unbiased variance. silu: whether SiLU follows. pieces: 1, or 2 where
    the channels are even. carried: BCHW of x's type, added to z, which is whole then; its gradient is that of z.
    Returns z, or its pieces along the channels, each contiguous, channels-last and of x's type.
    """
    z: tuple[Tensor, ...] = _NormedAndActivated.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, carried, latest, eps, silu, pieces, kernels
    )
    return z
