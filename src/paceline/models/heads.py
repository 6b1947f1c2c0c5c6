"""Detection heads: from the feature maps of three strides to raw boxes and class logits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from paceline.models.blocks import ConvUnit, DepthwiseConv
from paceline.models.convolution import BiasedConvolution
from paceline.models.ends import room_for
from paceline.models.operations.beside import apart, together
from paceline.models.operations.half_weights import OfParts, halved_apart
from paceline.models.operations.shared import shared

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Bins(nn.Module):
    """The fixed positions 0, 1, ... of the bins of a side's distribution, in units of the stride.

    Decoding needs no network (`paceline.boxes`), so this is never run; it is here for the checkpoints' sake.
    """

    def __init__(self, reg_max: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(reg_max, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.copy_(torch.arange(reg_max).view_as(self.conv.weight))


class DetectionHead(OfParts):
    """Per stride one branch for the box sides and one for the classes; all points of all strides joined.

    A side (left, top, right, bottom, from the point outwards) is a distribution over `reg_max` bins, as logits
    (generalised focal loss, arXiv 2006.04388). `depthwise` takes the lighter class branch of YOLO11.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        reg_max: int = 16,
        strides: Sequence[int] = (8, 16, 32),
        depthwise: bool,
    ) -> None:
        super().__init__()
        box_width = max(16, in_channels[0] // 4, 4 * reg_max)
        class_width = max(in_channels[0], min(num_classes, 100))
        class_branch = _depthwise_branch if depthwise else _branch
        self.cv2 = nn.ModuleList(_branch(channels, box_width, 4 * reg_max) for channels in in_channels)
        self.cv3 = nn.ModuleList(class_branch(channels, class_width, num_classes) for channels in in_channels)
        if reg_max > 1:
            self.dfl = Bins(reg_max)
        self._start_biases(strides, num_classes)

    def forward(self, *levels: Tensor) -> tuple[Tensor, Tensor]:
        """Map BCHW per stride to raw boxes BA(4R) and class logits BAK, A the points of all levels, each row-major."""
        count = len(levels)
        for_boxes, for_classes = zip(*(shared(level, 2) for level in levels), strict=True)
        branches, taken = cast("list[nn.Sequential]", [*self.cv2, *self.cv3]), (*for_boxes, *for_classes)
        kinds = [slice(0, count), slice(count, None)]
        rooms = [room_for(branches[kind], taken[kind], kind.start) for kind in kinds]
        pieces = []
        for number, (branch, level) in enumerate(zip(branches, taken, strict=True)):
            room = rooms[number // count]
            with apart(number, level), halved_apart(branch, level):
                pieces.append(room.ended(branch, level, number % count) if room else branch(level))
        together(dict(enumerate(pieces)))
        boxes, logits = (
            room.whole(pieces[kind]) if room else _join_points(pieces[kind])
            for room, kind in zip(rooms, kinds, strict=True)
        )
        return boxes, logits

    def _start_biases(self, strides: Sequence[int], num_classes: int) -> None:
        """Start with boxes of a few strides, and with scores as if an image of 640 px held five objects."""
        for box_branch, class_branch, stride in zip(self.cv2, self.cv3, strides, strict=True):
            nn.init.constant_(_last_bias(box_branch), 2.0)
            nn.init.constant_(_last_bias(class_branch), math.log(5 / num_classes / (640 / stride) ** 2))


def _branch(in_channels: int, width: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        ConvUnit(in_channels, width, 3),
        ConvUnit(width, width, 3),
        BiasedConvolution(width, out_channels, 1),
    )


def _depthwise_branch(in_channels: int, width: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(DepthwiseConv(in_channels), ConvUnit(in_channels, width)),
        nn.Sequential(DepthwiseConv(width), ConvUnit(width, width)),
        BiasedConvolution(width, out_channels, 1),
    )


def _join_points(maps: Sequence[Tensor]) -> Tensor:
    """Join BCHW maps to BAC; each is a view in any memory layout, copied once."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)


def _last_bias(branch: nn.Module) -> Tensor:
    bias = cast("nn.Conv2d", cast("nn.Sequential", branch)[-1]).bias
    assert bias is not None
    return bias
