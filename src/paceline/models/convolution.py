"""Convolutions: `nn.Conv2d` under the same keys, by kernels of our own where these are faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from paceline.triton_kernels import usable

if TYPE_CHECKING:
    from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


class Convolution(nn.Conv2d):
    """A convolution of square kernel without bias, padded to keep its size (over the stride)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, *, groups: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """BCHW to BNHW, in training on a GPU in half precision maybe by kernels of our own."""
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        if not self._has_kernels(x, dtype):
            return super().forward(x)
        from paceline.models.narrow_conv import convolved, is_narrow  # which need Triton

        if not is_narrow(self.in_channels, self.out_channels, self.stride[0]):
            return super().forward(x)
        return convolved(x, self.weight, self.stride[0], dtype)

    def _has_kernels(self, x: Tensor, dtype: torch.dtype) -> bool:
        """Whether there are kernels for such a convolution of such values."""
        return (
            x.is_cuda
            and self.kernel_size == (3, 3)
            and self.groups == 1
            and self.bias is None
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and dtype in _HALF
            and x.is_contiguous(memory_format=torch.channels_last)
            and usable(x.device)
        )
