"""Narrow convolution: 3 x 3 on maps with few channels as one differentiable operation, by `narrow_kernels`.

Each of the three passes is ours where that is faster, and torch's where it is not. Needs Triton.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from paceline.models.operations.beside import beside
from paceline.models.operations.half_weights import half_of, numbers_of, whole_of
from paceline.models.operations.moments import Moments
from paceline.models.operations.narrow_kernels import _convolve_cells, _convolve_narrow, _map_gradient, _weight_gradient
from paceline.models.operations.part_kernels import _settle_weight
from paceline.models.operations.parted_conv import gradients_apart
from paceline.triton_kernels import KEPT_CUTS, cdiv, next_power_of_2, shared_bytes, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.operations.moments import Tally

_VECTOR = 8
"""Channels that are loaded at once."""
_CELLS = 4
"""Beside each other, of a row of a product."""
_MOST_BESIDE = 32
"""Channels of two cells of y beside each other, which one row gives, since a program has registers for so many."""
_BY_CELLS = 16 * 32
"""Channels in times out, from which on convolutions at stride 1 go cell by cell."""
_WIDE = 32 * 64
"""The same, from which on a program has more weights than four warps have room for; at stride 2 it is cuDNN's then."""
_MUCH_SHARED = 160 * 1024
"""Bytes that a program may have on GPUs of data centres; on others it is 99 KB."""
_COLUMNS, _LINES = (16, 8, 4, 2), (160, 80, 40, 32, 24, 20, 16, 12, 10, 8, 6, 5, 4)
"""What there is to choose from, for rows of a tile in one line, and for lines of a strip."""
_MOST_IN, _MOST_OUT = 32, 64
"""Channels of the map that windows are taken from, and of the other one."""
_SETTLED_WEIGHTS, _SETTLED_PARTS = 16, 64
"""Weights that a program adds the parts of, and parts that it looks at together."""


@dataclass(frozen=True)
class Launch:
    """How kernels are launched, whose programs go down strips of the maps; changes the time only."""

    rows: int = 64
    """Of four cells, that a program looks at together; of one line, or of as many lines of other strips."""
    warps: int = 4
    stages: int = 3
    """Lines whose loads are under way together."""
    programs: int = 528
    """At least, as far as strips of a few lines give as many."""


@dataclass(frozen=True)
class Cells:
    """How a convolution is launched that goes cell by cell; changes the time only."""

    lines: int = 16
    columns: int = 8
    """Of the cells that a program looks at together; powers of two."""
    warps: int = 4
    stages: int = 2
    """Cells of the windows whose loads are under way together."""


CONVOLVING, CONVOLVING_BY_CELLS = Launch(programs=396), Cells()
TRACING, TRACING_WIDE = Launch(stages=1), Launch(warps=8, stages=1)
WEIGHING, WEIGHING_IN_LITTLE = Launch(programs=132), Launch(stages=2, programs=132)


def _is_wide(in_channels: int, out_channels: int) -> bool:
    """Whether four warps have no room for the weights; 24 channels take as much as 32."""
    return next_power_of_2(in_channels) * next_power_of_2(out_channels) >= _WIDE


def _outputs_of(out_channels: int, stride: int) -> int:
    """Return how many cells of y beside each other a row of a product gives."""
    return 2 if stride == 1 and 2 * out_channels <= _MOST_BESIDE else 1


@dataclass(frozen=True)
class _Cut:
    """How a map is cut into tiles: strips of lines, of which a tile has some, and columns of rows in them."""

    columns: int
    """Rows of a tile in each of its strips."""
    lines: int
    strips_down: int
    """Of an image."""
    strips: int
    tiles_across: int
    tiles: int

    @classmethod
    @functools.lru_cache(maxsize=KEPT_CUTS)
    def of(cls, images: int, size: tuple[int, int], outputs: int, launch: Launch) -> _Cut:
        height, width = size
        units = cdiv(width, outputs)
        columns = min(_COLUMNS, key=lambda count: (cdiv(units, count) * count, -count))
        tiles_across, at_once = cdiv(units, columns), launch.rows // columns

        def tiles_by(lines: int) -> int:
            return cdiv(images * cdiv(height, lines), at_once) * tiles_across

        fitting = [lines for lines in _LINES if tiles_by(lines) >= launch.programs]
        lines = min(fitting[0] if fitting else _LINES[-1], height)
        strips_down = cdiv(height, lines)
        lines = cdiv(height, strips_down)  # as even as can be
        return cls(columns, lines, strips_down, images * strips_down, tiles_across, tiles_by(lines))


def _convolved(
    x: Tensor,
    weight: Tensor,
    stride: int,
    launch: Launch | Cells | None = None,
    *,
    turned: bool = False,
    tally: Tally | None = None,
) -> Tensor:
    """Convolve BCHW with weights out, in, 3, 3; turned: those of which this is the gradient, in, out, 3, 3.

    tally: takes the moments of the result.
    """
    images, channels, height, width = x.shape
    out_channels = weight.shape[1 if turned else 0]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = x.new_empty((images, out_height, out_width, out_channels))
    by_cells = stride == 1 and channels * out_channels >= _BY_CELLS
    launch = launch or (CONVOLVING_BY_CELLS if by_cells else CONVOLVING)
    sizes = (height, width, out_height, out_width)
    ways = {"in_channels": channels, "out_channels": out_channels, "stride": stride, "turned": turned}
    ways |= {"stages": launch.stages, "num_warps": launch.warps}
    if isinstance(launch, Cells):
        down, across = cdiv(out_height, launch.lines), cdiv(out_width, launch.columns)
        tiles = images * down * across
        moments = Moments.empty(y, tiles, out_channels) if tally else None
        start_kernel(
            _convolve_cells,
            (tiles,),
            x,
            weight,
            y,
            moments.table if moments else y,
            *sizes,
            down,
            across,
            **ways,
            room=_room(channels),
            out_room=_room(out_channels),
            notes=moments is not None,
            lines=launch.lines,
            columns=launch.columns,
        )
    else:
        outputs = _outputs_of(out_channels, stride)
        cut = _Cut.of(images, (out_height, out_width), outputs, launch)
        moments = Moments.empty(y, cut.tiles * outputs, out_channels) if tally else None
        start_kernel(
            _convolve_narrow,
            (cut.tiles,),
            x,
            weight,
            y,
            moments.table if moments else y,
            *sizes,
            cut.strips,
            cut.strips_down,
            cut.tiles_across,
            cut.lines,
            cut.columns.bit_length() - 1,
            **ways,
            room=_room(_CELLS * channels),
            out_room=_room(outputs * out_channels),
            notes=moments is not None,
            outputs=outputs,
            rows=launch.rows,
        )
    if tally:
        tally.moments = moments
    return y.permute(0, 3, 1, 2)


def _traced_back(of_y: Tensor, weight: Tensor, size: tuple[int, int], launch: Launch | None = None) -> Tensor:
    """Return the gradient of the map, of this height and width, at stride 2."""
    images, out_channels, out_height, out_width = of_y.shape
    channels = weight.shape[1]
    height, width = size
    of_x = of_y.new_empty((images, height, width, channels))
    launch = launch or (TRACING_WIDE if _is_wide(channels, out_channels) else TRACING)
    cut = _Cut.of(images, (out_height, out_width), 1, launch)
    start_kernel(
        _map_gradient,
        (cut.tiles,),
        of_y,
        weight,
        of_x,
        height,
        width,
        out_height,
        out_width,
        cut.strips,
        cut.strips_down,
        cut.tiles_across,
        cut.lines,
        cut.columns.bit_length() - 1,
        in_channels=channels,
        out_channels=out_channels,
        room=_room(2 * out_channels),
        in_room=_room(2 * channels),
        rows=launch.rows,
        stages=launch.stages,
        num_warps=launch.warps,
    )
    return of_x.permute(0, 3, 1, 2)


def _weighed(x: Tensor, of_y: Tensor, stride: int, launch: Launch | None = None) -> Tensor:
    """Return the gradient of the weights, out, in, 3, 3, float32 and channels-last."""
    images, channels, height, width = x.shape
    _, out_channels, out_height, out_width = of_y.shape
    outputs = _outputs_of(out_channels, stride)
    room, out_room = _room(_CELLS * channels), _room(outputs * out_channels)
    has_room = not _is_wide(channels, out_channels) or shared_bytes(x) >= _MUCH_SHARED
    launch = launch or (WEIGHING if has_room else WEIGHING_IN_LITTLE)
    cut = _Cut.of(images, (out_height, out_width), outputs, launch)
    num_parts = cut.tiles * outputs
    parts = x.new_empty((num_parts, out_channels, 3, 3, channels), dtype=torch.float32)
    start_kernel(
        _weight_gradient,
        (cut.tiles,),
        x,
        of_y,
        parts,
        height,
        width,
        out_height,
        out_width,
        cut.strips,
        cut.strips_down,
        cut.tiles_across,
        cut.lines,
        cut.columns.bit_length() - 1,
        in_channels=channels,
        out_channels=out_channels,
        room=room,
        out_room=out_room,
        stride=stride,
        outputs=outputs,
        rows=launch.rows,
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
        is_narrow_back = out_channels <= _MOST_IN and in_channels <= _MOST_OUT
        if stride == 1:
            return cls(is_narrow or is_narrow_back, is_narrow_back, is_narrow)
        return cls(is_narrow and not _is_wide(in_channels, out_channels), is_narrow, is_narrow)


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
        convolving: Launch | Cells | None,
        weighing: Launch | None,
    ) -> Tensor:
        """Return y BNHW, channels-last and of the type of `factors`, the weight's numbers."""
        ctx.types, ctx.joins = (x.dtype, weight.dtype), joins
        x = x.to(factors.dtype).contiguous(memory_format=torch.channels_last)
        factors = factors.contiguous(memory_format=torch.channels_last)
        ours = _Ours.of(x.shape[1], len(weight), stride)
        ctx.save_for_backward(x, factors)
        ctx.stride, ctx.ours, ctx.launches = stride, ours, (convolving, weighing)
        if ours.forward:
            return _convolved(x, factors, stride, convolving, tally=tally)
        return F.conv2d(x, factors, stride=stride, padding=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the weights."""
        x, factors = ctx.saved_tensors
        type_of_x, type_of_weight = ctx.types
        convolving, weighing = ctx.launches
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
                of_x = _traced_back(of_y, factors, (x.shape[2], x.shape[3]))
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
    convolving: Launch | Cells | None = None,
    weighing: Launch | None = None,
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
