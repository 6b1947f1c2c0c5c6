"""Fused stem: the convolution of images with three colours as a differentiable operation, by `stem_kernels`.

Images take no gradient. They are read in the type that they have and rounded to the one that is computed in on the way.
So the gradient of the result is for the weight alone: where a norm of ours follows, it is not written, but computed by
the kernel that multiplies it (`handover.py`). Needs Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from paceline.models.operations.handover import Handover
from paceline.models.operations.moments import Moments
from paceline.models.operations.pitch import Layout, readable
from paceline.models.operations.stem_kernels import NUMBERS, OUTPUTS, _convolve, _multiply, _settle, _spread
from paceline.triton_kernels import cdiv, has_ptx, start_kernel

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.operations.handover import Unapplied
    from paceline.models.operations.moments import Tally

STEP = 8
"""Divides the number of filters, which are written eight at once."""
_WIDTHS = (64, 32, 16, 8)
"""Filters that a program may take together."""
_MOST_SUMMED = 16
"""Filters of a program whose threads have registers for sums of moments, too; else it takes twice the warps."""
SETTLED_ROWS, SETTLED_WEIGHTS = 512, 8
"""Of a program that adds parts."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched; changes the time only."""

    groups: int
    """Of four outputs, that a program looks at together; a power of two, 16 at least."""
    filters: int
    """That a program takes at most; 64, 32, 16 or 8."""
    warps: int
    stages: int
    """Turns of a loop whose loads are under way together."""
    programs: int
    """That share the groups, over all blocks of filters."""


FORWARD = Launch(groups=64, filters=32, warps=4, stages=2, programs=2112)
BACKWARD = Launch(groups=64, filters=32, warps=4, stages=2, programs=528)
NORMED = Launch(groups=64, filters=16, warps=4, stages=2, programs=396)
"""Where the gradient of the outputs is made on the way: three programs have room in a multiprocessor at a time."""


@dataclass(frozen=True)
class _Cut:
    """How a convolution is cut into groups of outputs, parts of these, and blocks of filters."""

    across: int
    """Groups of a line of outputs; the last may have fewer than four."""
    groups: int
    parts: int
    part_groups: int
    """Groups of a part; the last may have fewer."""
    blocks: int
    filters: int
    """Of a block."""

    @classmethod
    def of(cls, images: int, out_size: tuple[int, int], num_filters: int, launch: Launch) -> _Cut:
        filters = next(width for width in _WIDTHS if width <= launch.filters and num_filters % width == 0)
        blocks = num_filters // filters
        across = cdiv(out_size[1], OUTPUTS)
        groups = images * out_size[0] * across
        wanted = max(launch.programs // blocks, 1)
        part_groups = cdiv(cdiv(groups, wanted), launch.groups) * launch.groups
        return cls(across, groups, cdiv(groups, part_groups), part_groups, blocks, filters)


def warps_of(launch: Launch, filters: int, *, notes: bool, even: bool) -> int:
    """Return the warps of a program that convolves with so many filters.

    notes: whether it notes moments. even: whether lines begin where loads are wide and end with whole groups.
    """
    return launch.warps if not notes or (even and filters <= _MOST_SUMMED) else 2 * launch.warps


def multiplying_warps_of(launch: Launch, *, normed: bool, even: bool) -> int:
    """Return the warps of a program that multiplies, for whose threads one register per address is too much.

    normed: whether it makes the gradient first. even: whether all loads are wide and all groups whole.
    """
    return launch.warps if even or not normed else 2 * launch.warps


def _step(*distances: int) -> int:
    """Return what all distances are multiples of, as far as loads profit from it."""
    return STEP if all(distance % STEP == 0 for distance in distances) else 1


def _out_size(x: Tensor, stride: int) -> tuple[int, int]:
    """Return height and width of what windows of 3 x 3 with padding 1 see."""
    return (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1


def forwarded(
    x: Tensor, weight: Tensor, stride: int, dtype: torch.dtype, launch: Launch, tally: Tally | None = None
) -> Tensor:
    """Return y of `convolved`, without a gradient; a tally takes its moments."""
    images, colours, height, width = x.shape
    out_size, num_filters = _out_size(x, stride), len(weight)
    cut = _Cut.of(images, out_size, num_filters, launch)
    bands = x.new_empty((cut.blocks, 3, NUMBERS, OUTPUTS * cut.filters), dtype=dtype)
    start_kernel(
        _spread, (cut.blocks * 3,), weight, bands, *weight.stride(), stride=stride, channels=cut.filters, num_warps=4
    )
    y = x.new_empty((images, *out_size, num_filters), dtype=dtype)
    step, whole = _step(width), out_size[1] % OUTPUTS == 0
    moments = Moments.empty(y, cut.parts * OUTPUTS, num_filters, Handover()) if tally else None
    start_kernel(
        _convolve,
        (cut.parts * cut.blocks,),
        x,
        bands,
        y,
        moments.table if moments else y,
        cut.groups,
        cut.part_groups,
        cut.across,
        height,
        width * colours,
        *out_size,
        num_filters,
        stride=stride,
        notes=moments is not None,
        ptx=has_ptx(x),
        groups=launch.groups,
        channels=cut.filters,
        step=step,
        whole=whole,
        stages=launch.stages,
        num_warps=warps_of(launch, cut.filters, notes=moments is not None, even=whole and step == STEP),
    )
    if tally:
        tally.moments = moments
    return y.permute(0, 3, 1, 2)


def weighed(
    x: Tensor, of_y: Tensor, layout: Layout, stride: int, launch: Launch, unapplied: Unapplied | None = None
) -> Tensor:
    """Return the gradient of a weight by that of y, or by what that is made of."""
    of_y, pitch = readable(of_y) if unapplied is None else (unapplied.of_z, unapplied.pitch)
    none = of_y  # stands for what a kernel does not read
    of_norm = [none] * 5
    if unapplied is not None:
        of_norm = [unapplied.y, unapplied.kept, unapplied.weight, unapplied.bias, unapplied.of_affine]
    images, colours, height, width = x.shape
    out_size, num_filters, num_weights = _out_size(x, stride), layout.shape[0], layout.shape.numel()
    cut = _Cut.of(images, out_size, num_filters, launch)
    parts = x.new_empty((cut.parts * OUTPUTS, num_weights), dtype=torch.float32)
    step, of_y_step, whole = _step(width), _step(pitch), out_size[1] % OUTPUTS == 0
    is_even = whole and step == of_y_step == STEP
    start_kernel(
        _multiply,
        (cut.parts * cut.blocks,),
        x,
        of_y,
        *of_norm,
        parts,
        cut.groups,
        cut.across,
        height,
        width * colours,
        *out_size,
        num_filters,
        pitch,
        images * out_size[0] * out_size[1],
        stride=stride,
        normed=unapplied is not None,
        silu=unapplied is not None and unapplied.silu,
        ptx=has_ptx(x),
        groups=launch.groups,
        channels=cut.filters,
        step=step,
        of_y_step=of_y_step,
        whole=whole,
        stages=launch.stages,
        num_warps=multiplying_warps_of(launch, normed=unapplied is not None, even=is_even),
    )
    of_weight = torch.empty_strided(layout.shape, layout.strides, dtype=layout.dtype, device=x.device)
    start_kernel(
        _settle,
        (cdiv(num_weights, SETTLED_WEIGHTS),),
        parts,
        of_weight,
        len(parts),
        num_weights,
        *layout.strides,
        rows=SETTLED_ROWS,
        weights=SETTLED_WEIGHTS,
        num_warps=8,
    )
    return of_weight


class _Convolved(torch.autograd.Function):
    """3x3 convolution of B3HW with padding 1, differentiable by the weight."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        stride: int,
        dtype: torch.dtype,
        tally: Tally | None,
        launches: tuple[Launch, Launch, Launch],
    ) -> Tensor:
        """Return y, channels-last and of type `dtype`."""
        ctx.save_for_backward(x)
        ctx.layout, ctx.stride, ctx.launches = Layout.of(weight), stride, launches[1:]
        y = forwarded(x, weight, stride, dtype, launches[0], tally)
        ctx.handover = tally.moments.handover if tally and tally.moments else None
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the weight, laid out as that is and of its type."""
        (x,) = ctx.saved_tensors
        unapplied = ctx.handover.take() if ctx.handover else None
        launch = ctx.launches[0 if unapplied is None else 1]
        return None, weighed(x, of_y, ctx.layout, ctx.stride, launch, unapplied), None, None, None, None


def convolved(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    dtype: torch.dtype,
    tally: Tally | None = None,
    forward: Launch = FORWARD,
    backward: Launch = BACKWARD,
    normed: Launch = NORMED,
) -> Tensor:
    """Convolve B3HW with O 3x3 filters, padding 1; on the current stream, without waiting.

    x: float32, bfloat16 or float16, channels-last, not empty, takes no gradient. weight: O333, O a multiple of 8, of
    any of these types. stride: 1 or 2. dtype: what is computed in, bfloat16 or float16; or float32, which no tensor
    cores multiply: exact, and slow. tally: takes the moments of y, and the gradient of y is made on the way where a
    norm leaves it unwritten. forward, backward, normed: change the time only.
    Returns y, channels-last, of type `dtype`.
    """
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert x.shape[1:2] + weight.shape[1:] == (3, 3, 3, 3)
    assert len(weight) % STEP == 0
    assert stride in (1, 2)
    with torch.cuda.device_of(x):  # where Triton launches; a backward pass is in a thread of the device
        y: Tensor = _Convolved.apply(x, weight, stride, dtype, tally, (forward, backward, normed))
    return y
