"""Pattern: stripes, dots, checks, contours and noise, as fields of numbers in [0, 1].

Pixels are only added, subtracted, multiplied, divided and rooted, and never summed in an order that a machine may
choose: IEEE 754 rounds each of these in one way alone, so a picture has the same bytes wherever it is made.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from paceline.data.scenes.draws import Draws

    Field = NDArray[np.float32]
    """HW, or anything that broadcasts to it."""

PATTERNS: dict[str, Callable[[Field, Field, float, Draws], Field]] = {}
"""Makers of patterns: they take coordinates u and v in pixels, the period in pixels, and draws."""


def _pattern(
    maker: Callable[[Field, Field, float, Draws], Field],
) -> Callable[[Field, Field, float, Draws], Field]:
    PATTERNS[maker.__name__] = maker
    return maker


def _fraction(values: Field) -> Field:
    part: Field = values - np.floor(values)
    return part


def _ridge(values: Field) -> Field:
    """Return a wave of straight lines with period 1: 0 at whole numbers, 1 between them."""
    ridge: Field = np.float32(1.0) - np.abs(np.float32(2.0) * _fraction(values) - np.float32(1.0))
    return ridge


def _step(distance_px: Field) -> Field:
    """Return 0 below 0 and 1 above, with an edge one pixel wide."""
    step: Field = np.clip(distance_px + np.float32(0.5), np.float32(0.0), np.float32(1.0))
    return step


@_pattern
def stripes(u: Field, v: Field, period: float, draws: Draws) -> Field:
    """Return bands along v."""
    duty = draws.uniform(0.35, 0.65)
    return _step((_ridge(u / np.float32(period)) - np.float32(duty)) * np.float32(period / 2))


@_pattern
def dots(u: Field, v: Field, period: float, draws: Draws) -> Field:
    """Return discs on a square grid."""
    x = (_fraction(u / np.float32(period)) - np.float32(0.5)) * np.float32(period)
    y = (_fraction(v / np.float32(period)) - np.float32(0.5)) * np.float32(period)
    return _step(np.float32(period * draws.uniform(0.22, 0.36)) - np.sqrt(x * x + y * y))


@_pattern
def checks(u: Field, v: Field, period: float, draws: Draws) -> Field:
    """Return a chequered board."""
    half = np.float32(period / 2)
    across = _step((_ridge(u / np.float32(period)) - np.float32(0.5)) * half)
    along = _step((_ridge(v / np.float32(period)) - np.float32(0.5)) * half)
    return across + along - np.float32(2.0) * across * along


@_pattern
def waves(u: Field, v: Field, period: float, draws: Draws) -> Field:
    """Return bands that swing to and fro."""
    swing = _ridge(v / np.float32(period * draws.uniform(2.0, 3.5)))
    smooth: Field = swing * swing * (np.float32(3.0) - np.float32(2.0) * swing)
    return stripes(u + smooth * np.float32(period * draws.uniform(0.5, 1.0)), v, period, draws)


@_pattern
def lattice(u: Field, v: Field, period: float, draws: Draws) -> Field:
    """Return thin lines that cross."""
    width = np.float32(draws.uniform(0.06, 0.12) * period)
    half = np.float32(period / 2)
    across = _step(width - _ridge(u / np.float32(period)) * half)
    along = _step(width - _ridge(v / np.float32(period)) * half)
    return np.maximum(across, along)


def turned(height: int, width: int, angle: float) -> tuple[Field, Field]:
    """Return coordinates u and v of every pixel, turned by `angle` radians; each HW."""
    cosine, sine = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)[:, None]
    return x * cosine + y * sine, y * cosine - x * sine


def clouds(height: int, width: int, cells: int, draws: Draws) -> Field:
    """Return smooth noise: random numbers on a grid of `cells` x `cells`, blended between them; HW."""
    grid = draws.bytes(cells + 1, cells + 1).astype(np.float32) / np.float32(255.0)

    def blend(length: int) -> tuple[NDArray[np.int64], Field]:
        place: Field = (np.arange(length, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / length)
        cell = np.minimum(place.astype(np.int64), cells - 1)
        t: Field = place - cell.astype(np.float32)
        smooth: Field = t * t * (np.float32(3.0) - np.float32(2.0) * t)
        return cell, smooth

    row, down = blend(height)
    column, right = blend(width)
    rows = grid[row] + (grid[row + 1] - grid[row]) * down[:, None]
    field: Field = (rows[:, column] + (rows[:, column + 1] - rows[:, column]) * right).astype(np.float32, copy=False)
    return field


def contours(height: int, width: int, draws: Draws) -> Field:
    """Return lines of equal height of a smooth landscape, as on a map; HW."""
    levels = np.float32(draws.uniform(7.0, 14.0))
    land = clouds(height, width, draws.integer(2, 4), draws) * levels
    slope = np.float32(draws.uniform(0.1, 0.18))
    lines: Field = np.clip((slope - _ridge(land)) / slope * np.float32(2.0), np.float32(0.0), np.float32(1.0))
    return lines
