"""Stem: the convolution that a network begins with, which sees images of three colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from paceline.models.convolution import Convolution
from paceline.triton_kernels import autocast_type, on_gpu, usable

if TYPE_CHECKING:
    from paceline.models.operations.moments import Tally

_TYPES = (torch.bfloat16, torch.float16)
"""That kernels are launched for: in float32 they would multiply without tensor cores."""


class StemConvolution(Convolution):
    """A convolution of images, whose weight learns by kernels of its own on a GPU.

    These take 3x3 windows of channels-last images that need no gradient, in half precision, and filters whose number
    eight divides. All else is what it would be without: evaluation, compilation, other devices and types.
    """

    def forward(self, x: Tensor, *, tally: Tally | None = None) -> Tensor:
        """B3HW to B `out_channels` H/stride W/stride; a tally takes its moments, if they are known."""
        if not torch.compiler.is_compiling() and self._fits() and self._learns_from(x):
            dtype = self._type_for(x)
            if dtype in _TYPES and self._has_stem_kernels(x):
                from paceline.models.operations.fused_stem import convolved  # which needs Triton

                return convolved(x, self.weight, stride=self.stride[0], dtype=dtype, tally=tally)
        return super().forward(x, tally=tally)

    def _fits(self) -> bool:
        """Whether it is the convolution that there are kernels for; one that was fused with its norm has a bias."""
        return (
            self.in_channels == 3
            and self.out_channels % 8 == 0
            and self.kernel_size == (3, 3)
            and self.stride in ((1, 1), (2, 2))
            and self.groups == 1
            and self.bias is None
        )

    def _learns_from(self, x: Tensor) -> bool:
        """Whether the weight takes a gradient, and images that lie in channels-last order none."""
        return (
            self.training
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and not x.requires_grad
            and x.dim() == 4
            and x.shape[1] == 3
            and x.numel() > 0
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    def _type_for(self, x: Tensor) -> torch.dtype | None:
        """Return the type that torch would compute in on a GPU; None where it would refuse, or keep out of autocast."""
        types = {x.dtype, self.weight.dtype}
        if not types <= {torch.float32, torch.bfloat16, torch.float16}:
            return None
        return autocast_type(x) or (x.dtype if len(types) == 1 else None)

    def _has_stem_kernels(self, x: Tensor) -> bool:
        """Whether kernels work where images and weight are: plain tensors of one CUDA device."""
        return (
            on_gpu(x)
            and type(x) is Tensor
            and type(self.weight) in (Tensor, nn.Parameter)
            and self.weight.device == x.device
            and usable(x.device)
        )
