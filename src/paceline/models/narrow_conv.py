"""Narrow convolution: 3 x 3 on maps with few channels as one differentiable operation, by `narrow_kernels`.

Each of the three passes is ours where that is faster, and torch's where it is not. Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paceline.models.beside import beside
from paceline.models.half_weights import half_of, numbers_of, whole_of
from paceline.models.moments import Moments
from paceline.models.narrow_kernels import _convolve_narrow, _map_gradient, _weight_gradient
from paceline.models.part_kernels import _settle_weight
from paceline.models.parted_conv import gradients_apart
from paceline.triton_kernels import cdiv, next_power_of_2, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.moments import Tally

_VECTOR = 8
"""Channels that are loaded at once."""
_MOST_IN, _MOST_OUT = 32, 64
"""Channels of the map that windows are taken from, and of the other one; forward also the other way round."""
_MOST_BY_LINES = 32
"""Channels of windows that are multiplied line by line, and not cell by cell."""
_SETTLED_WEIGHTS, _SETTLED_PARTS = 16, 64
"""Weights that a program adds the parts of, and parts that it looks at together."""


@dataclass(frozen=True)
class Launch:
    """How kernels are launched; changes the time only."""

    lines: int
    columns: int
    """Of the cells that a program looks at together; powers of two."""
    warps: int
    stages: int = 2
    """Turns of a loop whose loads are under way together."""
    programs: int = 528
    """That share the cells of a gradient of weights; four for each multiprocessor of a large GPU."""


CONVOLVING = Launch(lines=16, columns=8, warps=4)
BY_CELLS = Launch(lines=16, columns=8, warps=4)
"""Of convolutions whose windows are multiplied cell by cell; half of the lines would be as good but for moments, which
came in so many parts then that they would have to be joined first.
"""
WEIGHING = Launch(lines=8, columns=8, warps=4)


def _convolved(
    x: Tensor, weight: Tensor, stride: int, launch: Launch, *, turned: bool = False, tally: Tally | None = None
) -> Tensor:
    """Convolve BCHW with weights out, in, 3, 3; turned: those of which this is the gradient, in, out, 3, 3.

    tally: takes the moments of the result.
    """
    images, channels, height, width = x.shape
    out_channels = weight.shape[1 if turned else 0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = x.new_empty((images, out_height, out_width, out_channels))
    down, across = cdiv(out_height, launch.lines), cdiv(out_width, launch.columns)
    by_lines = channels <= _MOST_BY_LINES
    moments = Moments.empty(y, images * down * across, out_channels) if tally else None
    start_kernel(
        _convolve_narrow,
        (images * down * across,),
        x,
        weight,
        y,
        moments.table if moments else y,
        height,
        width,
        out_height,
        out_width,
        down,
        across,
        in_channels=channels,
        out_channels=out_channels,
        room=_room(3 * channels if by_lines else channels),
        out_room=_room(out_channels),
        stride=stride,
        by_lines=by_lines,
        turned=turned,
        notes=moments is not None,
        lines=launch.lines,
        columns=launch.columns,
        stages=launch.stages,
        num_warps=launch.warps,
    )
    if tally:
        tally.moments = moments
    return y.permute(0, 3, 1, 2)


def _traced_back(of_y: Tensor, weight: Tensor, size: tuple[int, int], launch: Launch) -> Tensor:
    """Return the gradient of the map, of this height and width, at stride 2."""
    images, out_channels, out_height, out_width = of_y.shape
    channels = weight.shape[1]
    height, width = size
    of_x = of_y.new_empty((images, height, width, channels))
    down, across = cdiv(out_height, launch.lines), cdiv(out_width, launch.columns)
    start_kernel(
        _map_gradient,
        (images * down * across,),
        of_y,
        weight,
        of_x,
        height,
        width,
        out_height,
        out_width,
        down,
        across,
        in_channels=channels,
        out_channels=out_channels,
        room=_room(2 * out_channels),
        in_room=_room(2 * channels),
        lines=launch.lines,
        columns=launch.columns,
        num_warps=launch.warps,
    )
    return of_x.permute(0, 3, 1, 2)


def _weighed(x: Tensor, of_y: Tensor, stride: int, launch: Launch) -> Tensor:
    """Return the gradient of the weights, out, in, 3, 3, float32 and channels-last."""
    images, channels, height, width = x.shape
    _, out_channels, out_height, out_width = of_y.shape
    down, across = cdiv(out_height, launch.lines), cdiv(out_width, launch.columns)
    tiles = images * down * across
    num_parts = cdiv(tiles, cdiv(tiles, launch.programs))
    parts = x.new_empty((num_parts, out_channels, 3, 3, channels), dtype=torch.float32)
    start_kernel(
        _weight_gradient,
        (num_parts,),
        x,
        of_y,
        parts,
        height,
        width,
        out_height,
        out_width,
        down,
        across,
        tiles,
        in_channels=channels,
        out_channels=out_channels,
        room=_room(3 * channels),
        out_room=_room(out_channels),
        stride=stride,
        lines=launch.lines,
        columns=launch.columns,
        stages=launch.stages,
        num_warps=launch.warps,
    )
    of_weight = torch.empty_like(parts[0])
    start_kernel(
        _settle_weight,
        (cdiv(of_weight.numel(), _SETTLED_WEIGHTS),),
        parts,
        of_weight,
        of_weight.numel(),
        num_parts,
        at_once=_SETTLED_PARTS,
        weights=_SETTLED_WEIGHTS,
        num_warps=4,
    )
    return of_weight.permute(0, 3, 1, 2)


def _room(numbers: int) -> int:
    """Return the power of two that holds so many numbers, as large as products of matrices ask for."""
    return max(next_power_of_2(numbers), 16)


@dataclass(frozen=True)
class _Ours:
    """Which passes are ours: those of few channels, where cuDNN takes several times what the bytes take."""

    forward: bool
    map: bool
    weights: bool

    @classmethod
    def of(cls, in_channels: int, out_channels: int, stride: int) -> _Ours:
        is_narrow = in_channels <= _MOST_IN and out_channels <= _MOST_OUT
        is_narrow_back = out_channels <= _MOST_IN and in_channels <= _MOST_OUT and stride == 1
        return cls(is_narrow or is_narrow_back, is_narrow_back if stride == 1 else is_narrow, is_narrow)


class _Convolved(torch.autograd.Function):
    """3 x 3 convolution with padding 1 and without bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        factors: Tensor,
        stride: int,
        tally: Tally | None,
        joins: bool,
        convolving: Launch | None,
        weighing: Launch,
    ) -> Tensor:
        """Return y BNHW, channels-last and of the type of `factors`, the weight's numbers."""
        ctx.types, ctx.joins = (x.dtype, weight.dtype), joins
        x = x.to(factors.dtype).contiguous(memory_format=torch.channels_last)
        factors = factors.contiguous(memory_format=torch.channels_last)
        ours = _Ours.of(x.shape[1], len(weight), stride)
        ctx.save_for_backward(x, factors)
        ctx.stride, ctx.ours, ctx.launches = stride, ours, (convolving, weighing)
        if ours.forward:
            usual = CONVOLVING if x.shape[1] <= _MOST_BY_LINES else BY_CELLS
            return _convolved(x, factors, stride, convolving or usual, tally=tally)
        return F.conv2d(x, factors, stride=stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, factors = ctx.saved_tensors
        type_of_x, type_of_weight = ctx.types
        convolving, weighing = ctx.launches
        convolving = convolving or CONVOLVING
        of_y = of_y.contiguous(memory_format=torch.channels_last)
        wanted = ctx.needs_input_grad[:2]
        theirs = (wanted[0] and not ctx.ours.map, wanted[1] and not ctx.ours.weights)
        settings = ((ctx.stride,) * 2, (1, 1), (1, 1), False, (0, 0), 1)
        of_x, of_weight = gradients_apart(of_y, x, factors, settings, theirs, joins=ctx.joins)
        if wanted[1] and ctx.ours.weights:
            with beside(of_y, x, joins=ctx.joins):
                of_weight = _weighed(x, of_y, ctx.stride, weighing)
        if wanted[0] and ctx.ours.map:
            if ctx.stride == 1:
                of_x = _convolved(of_y, factors, 1, convolving, turned=True)
            else:
                of_x = _traced_back(of_y, factors, x.shape[2:], convolving)
        of_x = None if of_x is None else of_x.to(type_of_x)
        of_weight = None if of_weight is None else of_weight.to(type_of_weight)
        return of_x, of_weight, *[None] * 6


def is_narrow(in_channels: int, out_channels: int, stride: int) -> bool:
    """Whether a pass of a 3 x 3 convolution is ours: at most 32 channels on one side, multiples of eight."""
    ours = _Ours.of(in_channels, out_channels, stride)
    return in_channels % _VECTOR == 0 == out_channels % _VECTOR and (ours.forward or ours.map or ours.weights)


def convolved(
    x: Tensor,
    weight: Tensor,
    stride: int,
    dtype: torch.dtype,
    *,
    tally: Tally | None = None,
    convolving: Launch | None = None,
    weighing: Launch = WEIGHING,
) -> Tensor:
    """Convolve BCHW by N, C, 3, 3 with padding 1; on the current stream, without waiting.

    stride: 1 or 2. dtype: what is computed in, and the type of y; sums and the gradient of the weights are float32.
    tally: takes the moments of y, where the forward pass is ours. convolving, weighing: change the time only.
    Returns y BNHW, channels-last.
    """
    assert stride in (1, 2), "no other gradient of the map is known here"
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        sums_whole = _Ours.of(x.shape[1], len(weight), stride).weights
        learns = whole_of(weight) if sums_whole else half_of(weight, dtype)
        factors, joins = numbers_of(weight, dtype), learns is not weight
        y: Tensor = _Convolved.apply(x, learns, factors, stride, tally, joins, convolving, weighing)
    return y
