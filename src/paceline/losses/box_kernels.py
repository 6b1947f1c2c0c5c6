"""Boxes inside kernels, by Triton: what `paceline.boxes` computes, for lanes that hold a pair of boxes each."""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.boxes import EPS

_EPS = tl.constexpr(EPS)
_EIGHTH_TURN, _ASPECT_GAIN = tl.constexpr(0.7853981633974483), tl.constexpr(0.4052847345693511)  # pi / 4, 4 / pi^2


@triton.jit
def aspect_angle(width, height):
    """atan(width / height) within 1.5e-7, as `aspect_angle`; a polynomial, for one law in compiler and interpreter."""
    width, height = tl.maximum(width, 0.0), tl.maximum(height, _EPS)
    turned = (width - height) / (width + height)  # in [-1, 1]: the tangent of the angle above an eighth of a turn
    z = turned * turned
    series = 0.0027662835 * z - 0.0157312490
    series = series * z + 0.0421376235
    series = series * z - 0.0745685481
    series = series * z + 0.1061837063
    series = series * z - 0.1419779779
    series = series * z + 0.1999187203
    series = series * z - 0.3333303671
    series = series * z + 0.9999999818
    return _EIGHTH_TURN + turned * series


@triton.jit
def ciou(a_x1, a_y1, a_x2, a_y2, a_angle, b_x1, b_y1, b_x2, b_y2, b_angle):
    """Find the complete IoU, step by step as `ciou_of_sides`."""
    area_a = tl.maximum(a_x2 - a_x1, 0.0) * tl.maximum(a_y2 - a_y1, 0.0)
    area_b = tl.maximum(b_x2 - b_x1, 0.0) * tl.maximum(b_y2 - b_y1, 0.0)
    common_w = tl.maximum(tl.minimum(a_x2, b_x2) - tl.maximum(a_x1, b_x1), 0.0)
    common_h = tl.maximum(tl.minimum(a_y2, b_y2) - tl.maximum(a_y1, b_y1), 0.0)
    intersection = common_w * common_h
    iou = intersection / tl.maximum(area_a + area_b - intersection, _EPS)

    around_w = tl.maximum(a_x2, b_x2) - tl.minimum(a_x1, b_x1)
    around_h = tl.maximum(a_y2, b_y2) - tl.minimum(a_y1, b_y1)
    offset_x = (b_x1 + b_x2 - a_x1 - a_x2) * 0.5
    offset_y = (b_y1 + b_y2 - a_y1 - a_y2) * 0.5
    apart = offset_x * offset_x + offset_y * offset_y
    distance = apart / tl.maximum(around_w * around_w + around_h * around_h, _EPS)

    turn = b_angle - a_angle
    aspect = _ASPECT_GAIN * turn * turn
    alpha = aspect / tl.maximum(1 - iou + aspect, _EPS)
    return iou - distance - alpha * aspect


@triton.jit
def ciou_slopes(x1, y1, x2, y2, t_x1, t_y1, t_x2, t_y2):
    """Find the derivatives of `ciou` by the sides of the first box, `alpha` held fast, as autograd does."""
    width, height = x2 - x1, y2 - y1
    common_w = tl.minimum(x2, t_x2) - tl.maximum(x1, t_x1)
    common_h = tl.minimum(y2, t_y2) - tl.maximum(y1, t_y1)
    wide, high = tl.maximum(common_w, 0.0), tl.maximum(common_h, 0.0)
    intersection = wide * high
    area = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    union = area + tl.maximum(t_x2 - t_x1, 0.0) * tl.maximum(t_y2 - t_y1, 0.0) - intersection
    per_union = 1 / tl.maximum(union, _EPS)
    iou = intersection * per_union
    # A wider box has more area; more of it is common where its side is the inner one.
    of_area = tl.where(union >= _EPS, iou, 0.0) * per_union
    of_common = per_union + of_area
    across, down = tl.where(common_w >= 0, high * of_common, 0.0), tl.where(common_h >= 0, wide * of_common, 0.0)
    of_width = tl.where(width >= 0, tl.maximum(height, 0.0) * of_area, 0.0)
    of_height = tl.where(height >= 0, tl.maximum(width, 0.0) * of_area, 0.0)

    around_w = tl.maximum(x2, t_x2) - tl.minimum(x1, t_x1)
    around_h = tl.maximum(y2, t_y2) - tl.minimum(y1, t_y1)
    offset_x, offset_y = (x1 + x2 - t_x1 - t_x2) * 0.5, (y1 + y2 - t_y1 - t_y2) * 0.5
    diagonal = around_w * around_w + around_h * around_h
    per_diagonal = 1 / tl.maximum(diagonal, _EPS)
    distance = (offset_x * offset_x + offset_y * offset_y) * per_diagonal
    apart_x, apart_y = offset_x * per_diagonal, offset_y * per_diagonal
    of_diagonal = tl.where(diagonal >= _EPS, 2 * distance * per_diagonal, 0.0)
    around_x, around_y = of_diagonal * around_w, of_diagonal * around_h

    turn = aspect_angle(width, height) - aspect_angle(t_x2 - t_x1, t_y2 - t_y1)
    aspect = _ASPECT_GAIN * turn * turn
    alpha = aspect / tl.maximum(1 - iou + aspect, _EPS)
    w, h = tl.maximum(width, 0.0), tl.maximum(height, _EPS)
    of_angle = alpha * 2 * _ASPECT_GAIN * turn / (w * w + h * h)
    angle_w, angle_h = tl.where(width >= 0, of_angle * h, 0.0), tl.where(height >= _EPS, -of_angle * w, 0.0)

    by_x1 = of_width + angle_w - across * _beyond(x1, t_x1) - apart_x - around_x * _beyond(t_x1, x1)
    by_y1 = of_height + angle_h - down * _beyond(y1, t_y1) - apart_y - around_y * _beyond(t_y1, y1)
    by_x2 = across * _beyond(t_x2, x2) - of_width - angle_w - apart_x + around_x * _beyond(x2, t_x2)
    by_y2 = down * _beyond(t_y2, y2) - of_height - angle_h - apart_y + around_y * _beyond(y2, t_y2)
    return by_x1, by_y1, by_x2, by_y2


@triton.jit
def _beyond(a, b):
    """1 where a > b, a half where they are equal, as autograd shares what the larger of the two gets."""
    return tl.where(a > b, 1.0, tl.where(a == b, 0.5, 0.0))


@triton.jit
def four(place, shown):
    """Load four numbers that lie side by side."""
    return (
        tl.load(place, mask=shown, other=0.0),
        tl.load(place + 1, mask=shown, other=0.0),
        tl.load(place + 2, mask=shown, other=0.0),
        tl.load(place + 3, mask=shown, other=0.0),
    )
