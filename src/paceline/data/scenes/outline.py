"""Outline: the polygon of each class of shape, from which its picture and its exact box both come."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from paceline.data.scenes.draws import Draws

    Polygon = NDArray[np.float64]
    """N2, x and y; the shape's circumscribed circle has radius 1 and centre 0."""

NUM_ARC_POINTS = 96
"""Corners of a full circle: its chord leaves the arc by 0.0005 of the radius."""
NUM_CORNER_POINTS = 7
"""Points that a rounded corner is made of."""

OUTLINES: dict[str, Callable[[Draws], Polygon]] = {}
"""Maker of each class's polygon, in the order of the class numbers."""


def _outline(maker: Callable[[Draws], Polygon]) -> Callable[[Draws], Polygon]:
    OUTLINES[maker.__name__] = maker
    return maker


def _arc(start: float, end: float, radius: float = 1.0, centre_x: float = 0.0) -> Polygon:
    """Return points on a circle about (centre_x, 0) from angle `start` to `end`, in radians, both included."""
    count = max(math.ceil(abs(end - start) / math.tau * NUM_ARC_POINTS), 2)
    angles = [start + (end - start) * step / (count - 1) for step in range(count)]
    return np.array([(centre_x + radius * math.cos(angle), radius * math.sin(angle)) for angle in angles])


def _spokes(radii: list[float], turn: float = -math.pi / 2) -> Polygon:
    """Return points at equal angles and the given radii, the first one at the top."""
    angles = [turn + math.tau * step / len(radii) for step in range(len(radii))]
    return np.array(
        [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in zip(radii, angles, strict=True)]
    )


def rounded(corners: Polygon, share: float) -> Polygon:
    """Replace every corner by a quadratic curve that begins and ends this share of a side away from it (below .5)."""
    if share <= 0.0:
        return corners
    before = corners + share * (np.roll(corners, 1, axis=0) - corners)
    after = corners + share * (np.roll(corners, -1, axis=0) - corners)
    t = np.linspace(0.0, 1.0, NUM_CORNER_POINTS)[:, None, None]
    curve = (1 - t) * (1 - t) * before + 2 * t * (1 - t) * corners + t * t * after
    return curve.transpose(1, 0, 2).reshape(-1, 2)


@_outline
def circle(draws: Draws) -> Polygon:
    """Return a disc."""
    return _arc(0.0, math.tau)[:-1]


@_outline
def crescent(draws: Draws) -> Polygon:
    """Return a disc without the part that a second disc covers."""
    bite = draws.uniform(0.78, 0.92)
    shift = draws.uniform(0.42, 0.58)
    cross_x = (1.0 - bite * bite + shift * shift) / (2.0 * shift)
    cross_y = math.sqrt(1.0 - cross_x * cross_x)
    outer = math.atan2(cross_y, cross_x)
    inner = math.atan2(cross_y, cross_x - shift)
    return np.concatenate(
        [_arc(outer, math.tau - outer), _arc(math.tau - inner, inner, radius=bite, centre_x=shift)[1:-1]]
    )


@_outline
def cross(draws: Draws) -> Polygon:
    """Return a plus sign."""
    arm = draws.uniform(0.26, 0.38)
    end = math.sqrt(1.0 - arm * arm)
    quarter = [(arm, -end), (arm, -arm), (end, -arm)]
    corners = []
    for _ in range(4):
        corners += quarter
        quarter = [(-y, x) for x, y in quarter]
    return rounded(np.array(corners), draws.uniform(0.0, 0.3))


@_outline
def square(draws: Draws) -> Polygon:
    """Return a square."""
    return rounded(_spokes([1.0] * 4), draws.uniform(0.0, 0.2))


@_outline
def star(draws: Draws) -> Polygon:
    """Return a star of five points."""
    return rounded(_spokes([1.0, draws.uniform(0.4, 0.52)] * 5), draws.uniform(0.0, 0.2))


@_outline
def triangle(draws: Draws) -> Polygon:
    """Return a triangle of equal sides."""
    return rounded(_spokes([1.0] * 3), draws.uniform(0.0, 0.2))


CLASS_NAMES = tuple(OUTLINES)


def box_of(polygon: Polygon) -> tuple[float, float, float, float]:
    """Return the tight box xyxy of a polygon, in its own units."""
    low, high = polygon.min(axis=0), polygon.max(axis=0)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


def area_of(polygon: Polygon) -> float:
    """Return the area inside a simple polygon."""
    x, y = polygon[:, 0], polygon[:, 1]
    return abs(math.fsum(x * np.roll(y, -1) - y * np.roll(x, -1))) / 2.0
