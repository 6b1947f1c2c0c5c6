"""Fusion: batch norms folded into the convolutions before them, for evaluation and export."""

from __future__ import annotations

import copy
from typing import TypeVar

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from paceline.models.blocks import ConvUnit

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Return a copy in evaluation mode whose convolution units have a bias and no norm; `model` stays as it is.

    It answers what `model` answers in evaluation mode, up to rounding, and can no longer be trained.
    """
    fused = copy.deepcopy(model).eval().requires_grad_(False)
    for unit in fused.modules():
        if isinstance(unit, ConvUnit) and isinstance(unit.bn, nn.BatchNorm2d):
            unit.conv = fuse_conv_bn_eval(unit.conv, unit.bn)
            unit.bn = nn.Identity()
    return fused.requires_grad_(False)
