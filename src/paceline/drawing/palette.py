"""Palette: one colour per class for any number of classes, the ink that reads on it, and the hues of the figures."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Colour = tuple[int, int, int]
"""Red, green and blue in 0..255."""

INK = "#22272e"
"""Text, and lines that matter most."""
MUTED = "#6b7480"
"""Axis labels and lines of the second rank."""
GRID = "#e4e7eb"
"""Grid lines and frames."""
PAPER = "#ffffff"
"""Background."""
ACCENT = "#1f6fd6"
"""The one line that a figure is about."""
HUES = ("#1f6fd6", "#e8590c", "#2b9348", "#9c36b5", "#c99700", "#0c8599", "#d6336c", "#74b816", "#a47148", "#5f3dc4")
"""Lines of a figure, in order of use."""

_FIRST = (
    (0x3B, 0x8B, 0xF6), (0xFF, 0x8A, 0x1F), (0x2F, 0xC2, 0x5B), (0xF2, 0x3F, 0x4F), (0xA8, 0x5C, 0xF0),
    (0xF7, 0xD0, 0x2E), (0x14, 0xC8, 0xC8), (0xFF, 0x6F, 0xB5), (0x9B, 0xD8, 0x2A), (0xA6, 0x6A, 0x3F),
)  # fmt: skip
_BLOCK = 256


def class_colour(label: int) -> Colour:
    """Colour of a class number from 0; the same however many classes there are."""
    assert label >= 0, label
    table = class_colours((label // _BLOCK + 1) * _BLOCK)
    red, green, blue = table[label].tolist()
    return red, green, blue


def class_colours(num_classes: int) -> NDArray[np.uint8]:
    """Colours K3 of all classes: ten chosen by eye, then always the one that is furthest from all before it.

    Distance is Euclidean in Oklab (Ottosson 2020), where equal steps look equally large. Every prefix is the palette
    of fewer classes. No colour comes twice below 2,000 classes; beyond, they come round again.
    """
    blocks = max(-(-num_classes // _BLOCK), 1)
    table = _furthest_first(blocks * _BLOCK)
    return table[:num_classes].copy()


def ink_on(colour: Colour) -> Colour:
    """Black or white, whichever has the higher contrast on `colour` (WCAG 2.1, relative luminance)."""
    luminance = float(_linear(np.asarray(colour)) @ np.array([0.2126, 0.7152, 0.0722]))
    return (255, 255, 255) if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else (0, 0, 0)


def to_hex(colour: Colour) -> str:
    """`#rrggbb`, as matplotlib reads it."""
    red, green, blue = colour
    return f"#{red:02x}{green:02x}{blue:02x}"


def oklab(colours_N3: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Lightness and the two opponent axes (N3) of sRGB colours; Ottosson, "A perceptual color space", 2020."""
    to_cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    to_lab = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    lab: NDArray[np.float64] = np.cbrt(_linear(colours_N3) @ to_cones.T) @ to_lab.T
    return lab


def _linear(colours: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Undo the transfer curve of sRGB."""
    share = colours / 255.0
    return np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)


@lru_cache(maxsize=8)
def _furthest_first(count: int) -> NDArray[np.uint8]:
    """Order the candidates so that each is furthest from those before it; `count` rows, repeating at the end."""
    levels = np.arange(16, 256, 12)
    grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3).astype(np.uint8)
    lab = oklab(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    candidates = grid[(lab[:, 0] > 0.52) & (lab[:, 0] < 0.9) & (chroma > 0.07) & (chroma < 0.24)]
    places = oklab(candidates)
    first = np.array(_FIRST, dtype=np.uint8)
    nearest = np.min(np.linalg.norm(places[:, None] - oklab(first)[None], axis=-1), axis=1)
    chosen = list(first)
    for _ in range(min(count, len(candidates)) - len(first)):
        best = int(nearest.argmax())
        chosen.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(places - places[best], axis=1))
    return np.resize(np.array(chosen, dtype=np.uint8), (count, 3))
