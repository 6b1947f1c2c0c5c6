"""Blocks: the parts that the networks are built of.

Every block takes and gives BCHW tensors and keeps height and width unless it says otherwise. The names of
submodules (`cv1`, `m`, `attn`, ...) are those of the published checkpoints, so that their tensors fit by key.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn import functional as F

from paceline.models.convolution import Convolution
from paceline.models.joint import convolved_jointly
from paceline.models.operations import compiled_norm
from paceline.models.operations.beside import ASIDE, aside, together
from paceline.models.operations.moments import Tally
from paceline.models.operations.shared import shared
from paceline.models.stem import StemConvolution
from paceline.triton_kernels import takes_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor

    from paceline.models.operations.moments import Moments


class Activating:
    """What stands after a convolution and may activate too, so that what lies between need not be written."""

    if TYPE_CHECKING:
        __call__: Callable[..., Tensor]

    def takes_moments(self) -> bool:
        """Whether it would make use of the moments of its next map."""
        return False

    def activated(
        self,
        x: Tensor,
        activation: nn.Module,
        pieces: int = 1,
        carried: Tensor | None = None,
        moments: Moments | None = None,
    ) -> tuple[Tensor, ...]:
        """Normalise BCHW and activate it; in equal pieces along the channels, or added to what is carried past it.

        moments: those of the map, if they are known.
        """
        assert pieces == 1 or carried is None
        whole: Tensor = activation(self(x) if moments is None else self(x, moments))
        whole = whole if carried is None else carried + whole
        return (whole,) if pieces == 1 else torch.chunk(whole, pieces, dim=1)


class NormWithActivation(Activating, nn.BatchNorm2d):
    """A batch norm that may carry out the activation after it too."""


class FoldedNorm(Activating, nn.Identity):
    """In the place of a norm that has become part of its convolution: the activation alone, quickly on a CPU."""

    def activated(
        self,
        x: Tensor,
        activation: nn.Module,
        pieces: int = 1,
        carried: Tensor | None = None,
        moments: Moments | None = None,
    ) -> tuple[Tensor, ...]:
        """Activate BCHW, which nobody needs afterwards; in equal pieces, or added to what is carried past it."""
        suits = (
            type(activation) is nn.SiLU
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and (carried is None or (carried.dtype == x.dtype and carried.shape == x.shape))
            and x.shape[1] % pieces == 0
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        compiled = compiled_norm.kernels_for(x) if suits else None
        if compiled is None:
            return super().activated(x, activation, pieces, carried, moments)
        return compiled_norm.activated_in_place(x, compiled, pieces=pieces, carried=carried)


class ConvUnit(nn.Module):
    """Convolution without bias, batch norm, SiLU; B C H W to B `out_channels` H/stride W/stride.

    SiLU works out of place: its input is saved for the backward pass of the norm, so writing over it would cost a copy.
    Blocks use units by `added`, `joined` and `halves` too, which call no hooks of the unit, its norm or its activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__()
        kind = StemConvolution if in_channels == 3 else Convolution
        self.conv: nn.Conv2d = kind(in_channels, out_channels, kernel, stride, groups=groups)
        self.bn: nn.Module = nn.BatchNorm2d(out_channels, eps=1e-3, momentum=0.03)
        self.act: nn.Module = nn.SiLU() if activation else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, normalise, activate."""
        return self._finished((x,))[0]

    def added(self, x: Tensor, carried: Tensor) -> Tensor:
        """Give `carried`, a map like the result, plus the result."""
        return self._finished((x,), carried=carried)[0]

    def joined(self, *maps: Tensor) -> Tensor:
        """Give what `forward` does of maps joined along their channels; on GPUs without joining them."""
        return self._finished(maps)[0]

    def halves(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Cut what `joined` gives in two halves of the channels; the same numbers, but maybe not in one place."""
        return self._finished(maps, 2)

    def _finished(self, maps: tuple[Tensor, ...], pieces: int = 1, carried: Tensor | None = None) -> tuple[Tensor, ...]:
        if isinstance(self.bn, Activating):
            tally = Tally() if self.bn.takes_moments() else None
            convolved = convolved_jointly(self.conv, maps, tally)
            return self.bn.activated(convolved, self.act, pieces, carried, tally.moments if tally else None)
        activated: Tensor = self.act(self.bn(convolved_jointly(self.conv, maps)))
        activated = activated if carried is None else carried + activated
        return (activated,) if pieces == 1 else torch.chunk(activated, pieces, dim=1)


class DepthwiseConv(ConvUnit):
    """A convolution unit in which every channel has a filter of its own."""

    def __init__(self, channels: int, kernel: int = 3, *, activation: bool = True) -> None:
        super().__init__(channels, channels, kernel, groups=channels, activation=activation)


class Bottleneck(nn.Module):
    """Two 3x3 units, `channels` to `hidden` and back, around which the input may be carried."""

    def __init__(self, channels: int, hidden: int, *, residual: bool) -> None:
        super().__init__()
        self.cv1 = ConvUnit(channels, hidden, 3)
        self.cv2 = ConvUnit(hidden, channels, 3)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """Give x + f(x), or f(x) without the residual."""
        if self.residual:
            x, carried = shared(x, 2)
            return self.cv2.added(self.cv1(x), carried)
        y: Tensor = self.cv2(self.cv1(x))
        return y


class SplitChain(nn.Module):
    """The shell of C2f and C3k2: 1x1, cut in two halves, a chain of blocks on the second, all pieces joined, 1x1.

    x -- cv1 --+-- first half ----------------------+
               +-- second half --+------------------+
                                 +-- m.0 --+--------+-- cat -- cv2 -- y
                                           +-- m.1 -+
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int, chain: list[nn.Module]) -> None:
        super().__init__()
        self.cv1 = ConvUnit(in_channels, 2 * hidden)
        self.cv2 = ConvUnit((2 + len(chain)) * hidden, out_channels)
        self.m = nn.ModuleList(chain)

    def forward(self, *maps: Tensor) -> Tensor:
        """Join both halves and what every block of the chain answers; several maps count as joined along channels."""
        pieces = list(self.cv1.halves(*maps))
        for block in self.m:
            pieces[-1], taken = shared(pieces[-1], 2)
            pieces.append(block(taken))
        return self.cv2.joined(*pieces)


class C2f(SplitChain):
    """Split chain of `repeats` full-width bottlenecks (YOLOv8)."""

    def __init__(self, in_channels: int, out_channels: int, repeats: int, *, residual: bool) -> None:
        hidden = out_channels // 2
        chain: list[nn.Module] = [Bottleneck(hidden, hidden, residual=residual) for _ in range(repeats)]
        super().__init__(in_channels, out_channels, hidden, chain)


class C3k(nn.Module):
    """Two 1x1 units side by side, at half width; two bottlenecks on the first; joined by a third 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.cv1 = ConvUnit(channels, hidden)
        self.cv2 = ConvUnit(channels, hidden)
        self.cv3 = ConvUnit(2 * hidden, channels)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, residual=True) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """Join the deep and the shallow branch."""
        x, other = shared(x, 2)
        with aside(other):
            shallow = self.cv2(other)
        deep = self.m(self.cv1(x))
        together({ASIDE: shallow})
        return self.cv3.joined(deep, shallow)


class C3k2(SplitChain):
    """Split chain of `repeats` C3k blocks, or of bottlenecks with a half-width middle (YOLO11).

    `ratio` is the width of the chain as a share of `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, repeats: int, *, c3k: bool, ratio: float = 0.5) -> None:
        hidden = int(out_channels * ratio)
        chain: list[nn.Module] = [
            C3k(hidden) if c3k else Bottleneck(hidden, hidden // 2, residual=True) for _ in range(repeats)
        ]
        super().__init__(in_channels, out_channels, hidden, chain)


class SPPF(nn.Module):
    """Pyramid of three 5x5 max-pools in a row, each seeing farther, joined with their input."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = in_channels // 2
        self.cv1 = ConvUnit(in_channels, hidden)
        self.cv2 = ConvUnit(4 * hidden, out_channels)
        self.pool = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        """Join what fields of 1, 5, 9 and 13 cells see."""
        joined: Tensor = self.cv2(self._pyramid(self.cv1(x), 3))
        return joined

    def _pyramid(self, x: Tensor, pools: int) -> Tensor:
        """B C H W to B (1 + pools)C H W: the map, and pools each of the one before."""
        if self.training and x.shape[1] % 8 == 0 and takes_map(x):
            from paceline.models.operations.fused_pool import pyramid  # which needs Triton

            return pyramid(x, pools)
        pieces = [x]
        for _ in range(pools):
            pieces.append(self.pool(pieces[-1]))
        return torch.cat(pieces, dim=1)


class Attention(nn.Module):
    """Self-attention over all cells of the map, with a depth-wise convolution of the values as position.

    The channels of `qkv` are, head by head, query, key and value; queries and keys are half as wide as values.
    """

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.value_width = channels // num_heads
        self.key_width = self.value_width // 2
        self.qkv = ConvUnit(channels, channels + 2 * num_heads * self.key_width, activation=False)
        self.proj = ConvUnit(channels, channels, activation=False)
        self.pe = DepthwiseConv(channels, activation=False)

    def forward(self, x: Tensor, carried: Tensor | None = None) -> Tensor:
        """Attend from every cell to every cell, and add it to what is carried past.

        On channels-last input, q, k and v are views.
        """
        heads = self.qkv(x).permute(0, 2, 3, 1).unflatten(3, (self.num_heads, -1))
        q, k, v = heads.split((self.key_width, self.key_width, self.value_width), dim=4)
        with aside(v):
            position = self.pe(v.flatten(3).permute(0, 3, 1, 2))
        attended = F.scaled_dot_product_attention(*(cells.flatten(1, 2).transpose(1, 2) for cells in (q, k, v)))
        attended = attended.transpose(1, 2).reshape_as(v).flatten(3).permute(0, 3, 1, 2)
        together({ASIDE: position})
        positioned = attended + position
        projected: Tensor = self.proj(positioned) if carried is None else self.proj.added(positioned, carried)
        return projected


class PSA(nn.Module):
    """Attention and a two-layer perceptron of each cell, both with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attn = Attention(channels, num_heads=max(channels // 64, 1))
        self.ffn = nn.Sequential(ConvUnit(channels, 2 * channels), ConvUnit(2 * channels, channels, activation=False))

    def forward(self, x: Tensor) -> Tensor:
        """Mix between cells, then within each."""
        x, carried = shared(x, 2)
        x, carried = shared(self.attn(x, carried), 2)
        widen, narrow = cast("Iterable[ConvUnit]", self.ffn)
        return narrow.added(widen(x), carried)


class C2PSA(nn.Module):
    """1x1, cut in two halves, `repeats` PSA blocks on the second, joined, 1x1."""

    def __init__(self, channels: int, repeats: int) -> None:
        super().__init__()
        hidden = channels // 2
        self.cv1 = ConvUnit(channels, 2 * hidden)
        self.cv2 = ConvUnit(2 * hidden, channels)
        self.m = nn.Sequential(*(PSA(hidden) for _ in range(repeats)))

    def forward(self, x: Tensor) -> Tensor:
        """Attend on one half of the channels, carry the other."""
        carried, attended = self.cv1.halves(x)
        return self.cv2.joined(carried, self.m(attended))


class Upsample(nn.Upsample):
    """Nearest neighbour, twice the height and width.

    It copies numbers, so it stays out of autocast, which would make them float32, and with them all that they join.
    """

    def __init__(self) -> None:
        super().__init__(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        """B C H W to B C 2H 2W, of one type."""
        if self.training and x.shape[1] % 8 == 0 and takes_map(x):
            from paceline.models.operations.doubling import doubled_map  # which needs Triton

            return doubled_map(x)
        kind = x.device.type
        has_autocast = torch.compiler.is_compiling() or torch.amp.is_autocast_available(kind)  # which 2.11 cannot trace
        with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
            doubled: Tensor = super().forward(x)
        return doubled


class Concat(nn.Module):
    """Join maps of one size along their channels, in the order given."""

    def forward(self, *maps: Tensor) -> Tensor:
        """B C1 H W, B C2 H W, ... to B C1+C2+... H W."""
        return torch.cat(maps, dim=1)
