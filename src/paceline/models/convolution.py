"""Convolutions: `nn.Conv2d` under the same keys, by kernels of our own where these are faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from paceline.models.operations import parted_conv
from paceline.models.operations.half_weights import half_of
from paceline.triton_kernels import autocast_type, on_gpu, takes_map, usable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.models.operations.moments import Tally

_HALF = (torch.bfloat16, torch.float16)


class Convolution(nn.Conv2d):
    """A convolution of square kernel without bias, padded to keep its size (over the stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor, *, tally: Tally | None = None) -> Tensor:
        """BCHW to BNHW, in training on a GPU in half precision maybe by kernels of our own.

        tally: takes the moments of the result, where a kernel sums them up on the way.
        """
        if torch.compiler.is_compiling():
            return super().forward(x)
        dtype = autocast_type(x) or x.dtype
        if not self._has_kernels(x, dtype):
            return self._by_torch(x, dtype)
        from paceline.models.operations import depthwise_conv, narrow_conv  # which need Triton

        if self.groups > 1:
            half = half_of(self.weight, dtype)
            return depthwise_conv.convolved(x, half, dtype, joins=half is not self.weight)
        if narrow_conv.is_narrow(self.in_channels, self.out_channels, self.stride[0]):
            return narrow_conv.convolved(x, self.weight, self.stride[0], dtype, tally=tally)
        return self._by_torch(x, dtype)

    def _by_torch(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Convolve as `nn.Conv2d` does, which under autocast computes in this type."""
        half = half_of(self.weight, dtype)
        if half is not self.weight and on_gpu(x) and self.bias is None:
            return parted_conv.convolved(x, half, self)
        y: Tensor = self._conv_forward(x, half, self.bias)
        return y

    def _has_kernels(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there are kernels for such a convolution of such values."""
        return (
            on_gpu(x)
            and self.kernel_size == (3, 3)
            and self.stride in ((1, 1), (2, 2))
            and (self.groups == 1 or self._is_depthwise())
            and self.bias is None
            and self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and dtype in _HALF
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
            and usable(x.device)
        )

    def _is_depthwise(self) -> bool:
        """Whether there is a filter for each channel, and eight channels may be loaded at once."""
        alone = self.groups == self.in_channels == self.out_channels and self.stride == (1, 1)
        return alone and self.in_channels % 8 == 0


class BiasedConvolution(nn.Conv2d):
    """A convolution with bias, whose gradient is summed by a kernel of ours where there is one for it."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve B C H W."""
        weight = self.weight if torch.compiler.is_compiling() else half_of(self.weight, autocast_type(x))
        if self.bias is None or not (self.training and torch.is_grad_enabled() and takes_map(x)):
            y: Tensor = self._conv_forward(x, weight, self.bias)
            return y
        from paceline.models.operations.fused_bias import biased_convolution  # which needs Triton

        assert self.padding_mode == "zeros"
        assert not isinstance(self.padding, str)
        return biased_convolution(
            x,
            weight,
            self.bias,
            joins=weight is not self.weight,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
