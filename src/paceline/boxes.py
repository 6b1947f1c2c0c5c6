"""Boxes: formats, overlaps, anchor points and the distances from a point to the four sides, as pure functions.

Boxes are xyxy (left, top, right, bottom) unless a name says otherwise; the image's y axis points down.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

EPS = 1e-7
"""Floor of denominators: only boxes without any extent ever meet it."""


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Turn boxes ...4 given by two corners into centre x, centre y, width, height; any unit."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), dim=-1)


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Turn boxes ...4 given by centre x, centre y, width, height into two corners; any unit."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every box of `a` (...N4) with every box of `b` (...M4): ...NM, in [0, 1].

    Boxes without area overlap nothing, themselves included.
    """
    a, b = a.unsqueeze(-2), b.unsqueeze(-3)
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _area(a) + _area(b) - intersection
    return intersection / union.clamp(min=EPS)


def paired_ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of each box of `a` (...4) with the box of `b` (...4) at the same place: ..., in (-2, 1].

    IoU, less the squared distance of the centres over the squared diagonal of the box around both, less a penalty for
    different aspect ratios. The weight `alpha` of that penalty carries no gradient.
    Source: arXiv 1911.08287, equations 7, 10 and 11.
    """
    aspect_a, aspect_b = aspect_angle(a), aspect_angle(b)
    return ciou_of_sides(a.unbind(-1), b.unbind(-1), aspect_a, aspect_b)


def aspect_angle(boxes: Tensor) -> Tensor:
    """Angle atan(width / height) of boxes ...4, in radians: 0 for a horizontal extent of nothing."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.atan((x2 - x1).clamp(min=0) / (y2 - y1).clamp(min=EPS))


def ciou_of_sides(a: Sequence[Tensor], b: Sequence[Tensor], aspect_a: Tensor, aspect_b: Tensor) -> Tensor:
    """Complete IoU from separate sides (x1, y1, x2, y2) and aspect angles, of any shapes that broadcast.

    For callers that compare many pairs of few boxes: the angles, which are the dear part, are computed once per box.
    """
    a_x1, a_y1, a_x2, a_y2 = a
    b_x1, b_y1, b_x2, b_y2 = b
    area_a = (a_x2 - a_x1).clamp(min=0) * (a_y2 - a_y1).clamp(min=0)
    area_b = (b_x2 - b_x1).clamp(min=0) * (b_y2 - b_y1).clamp(min=0)
    intersection = (torch.minimum(a_x2, b_x2) - torch.maximum(a_x1, b_x1)).clamp(min=0) * (
        torch.minimum(a_y2, b_y2) - torch.maximum(a_y1, b_y1)
    ).clamp(min=0)
    iou = intersection / (area_a + area_b - intersection).clamp(min=EPS)

    around_w = torch.maximum(a_x2, b_x2) - torch.minimum(a_x1, b_x1)
    around_h = torch.maximum(a_y2, b_y2) - torch.minimum(a_y1, b_y1)
    offset_x = (b_x1 + b_x2 - a_x1 - a_x2) / 2
    offset_y = (b_y1 + b_y2 - a_y1 - a_y2) / 2
    distance = (offset_x.square() + offset_y.square()) / (around_w.square() + around_h.square()).clamp(min=EPS)

    aspect = (4 / math.pi**2) * (aspect_b - aspect_a).square()
    alpha = (aspect / (1 - iou + aspect).clamp(min=EPS)).detach()
    return iou - distance - alpha * aspect


def anchor_points(
    size_hw: tuple[int, int],
    strides: Sequence[int] = (8, 16, 32),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Centres A2 (x, y) in pixels of all cells of all levels, and the stride A of each in pixels.

    Levels follow each other in the order of `strides`, each row by row. Sides must be multiples of every stride.
    """
    height, width = size_hw
    assert all(side % stride == 0 for side in size_hw for stride in strides), (size_hw, strides)
    points, point_strides = [], []
    for stride in strides:
        x = (torch.arange(width // stride, device=device, dtype=dtype) + 0.5) * stride
        y = (torch.arange(height // stride, device=device, dtype=dtype) + 0.5) * stride
        grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), dim=-1).view(-1, 2))
        point_strides.append(torch.full((len(x) * len(y),), stride, device=device, dtype=dtype))
    return torch.cat(points), torch.cat(point_strides)


def distances_to_boxes(points: Tensor, distances: Tensor) -> Tensor:
    """Boxes ...A4 from points A2 and their distances ...A4 to the left, top, right and bottom side, in one unit."""
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), dim=-1)


def box_distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances ...A4 from points A2 to the left, top, right and bottom side of boxes ...A4; negative outside."""
    return torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), dim=-1)


def expected_distances(raw: Tensor) -> Tensor:
    """Distances ...4 in units of the stride from raw outputs ...(4R): each side the mean of a distribution on 0..R-1.

    Each side's R numbers are logits; with R = 1 the number is the distance itself. Source: arXiv 2006.04388.
    """
    bins = raw.shape[-1] // 4
    if bins == 1:
        return raw
    probabilities = raw.reshape(*raw.shape[:-1], 4, bins).softmax(dim=-1)
    return probabilities @ torch.arange(bins, device=raw.device, dtype=raw.dtype)


def decode_boxes(raw: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes BA4 in pixels from raw outputs BA(4R), points A2 and strides A in pixels."""
    return distances_to_boxes(points, expected_distances(raw) * strides.unsqueeze(-1))


def _area(boxes: Tensor) -> Tensor:
    sides = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return sides[..., 0] * sides[..., 1]
