"""Fusion: batch norms folded into the convolutions before them, for evaluation and export."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from paceline.models.blocks import ConvUnit, FoldedNorm
from paceline.models.convolution import Convolution
from paceline.models.stem import StemConvolution

if TYPE_CHECKING:
    import torch

M = TypeVar("M", bound=nn.Module)
_FOLDED = (nn.Conv2d, Convolution, StemConvolution)


def fuse(model: M, *, for_autocast: torch.dtype | None = None) -> M:
    """Return a copy in evaluation mode whose convolution units have a bias and no norm; `model` stays as it is.

    Units with a convolution of somebody's own keep their norm. The copy answers what `model` answers in evaluation
    mode, up to rounding, and can no longer be trained.

    for_autocast: a type in which the copy is to run under autocast. Its convolutions have weights and biases in it
        then, to the bit those to which autocast would round them for every batch.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for unit in fused.modules():
        if isinstance(unit, ConvUnit) and isinstance(unit.bn, nn.BatchNorm2d) and type(unit.conv) in _FOLDED:
            unit.conv = fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = FoldedNorm()
    for module in fused.modules():
        if for_autocast is not None and isinstance(module, nn.Conv2d):
            module.to(for_autocast)
    return fused.requires_grad_(False)
