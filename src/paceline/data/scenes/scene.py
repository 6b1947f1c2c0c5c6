"""Scene: one generated picture of shapes, with light, shadow and texture, and the exact boxes of its shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from paceline.data.scenes.outline import CLASS_NAMES, OUTLINES, area_of, box_of
from paceline.data.scenes.palette import PALETTES, Colour, Palette
from paceline.data.scenes.pattern import PATTERNS, clouds, contours, turned

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.scenes.draws import Draws
    from paceline.data.scenes.outline import Polygon
    from paceline.data.scenes.pattern import Field

SUPERSAMPLING = 4
"""A shape's mask is drawn this many times larger, then averaged."""
SUBPIXEL_BITS = 6
"""Binary places of the corners that OpenCV fills between."""
PLACEMENT_TRIES = 12
"""Places tried for a shape before it is left out."""


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """How hard the pictures are; lengths in pixels."""

    size: int = 320
    """Side of the square picture."""
    shapes: tuple[int, int] = (3, 10)
    """Least and most shapes in a picture (fewer where there is no room)."""
    diameters: tuple[tuple[float, float, float], ...] = ((0.12, 16, 32), (0.48, 32, 80), (0.4, 80, 140))
    """Share of the shapes, least and largest diameter of the circle about them."""
    stretch: float = 1.15
    """Longest shape over its natural proportions."""
    least_visible: float = 0.78
    """Share of each shape that stays visible behind others and inside the picture, at least."""
    least_contrast: float = 0.28
    """Least distance of a shape's colour from the ground's, in RGB of [0, 1]."""
    plain_below: float = 24.0
    """Shapes of a smaller diameter have neither pattern nor rim."""
    pattern_contrast: float = 0.22
    """Strongest pattern of the ground."""
    threads: int = 4
    """Most thin curves across the ground, which are no shapes."""
    exposure: tuple[float, float] = (0.78, 1.15)
    """Darkest and brightest picture."""
    fall_off: float = 0.4
    """Strongest change of the light from one side of the picture to the other."""
    vignette: float = 0.5
    """Strongest darkening of the corners."""
    noise: float = 0.04
    """Strongest grain."""
    blur: float = 0.15
    """Share of pictures that are slightly out of focus."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture and its truth."""

    image: NDArray[np.uint8]
    """HW3, blue first, as OpenCV writes it."""
    boxes: NDArray[np.float64]
    """N4, xyxy in pixels, around the whole shape (hidden parts too), clipped to the picture."""
    labels: tuple[int, ...]
    """N class numbers."""


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """A placed shape: its class, its outline in the picture's pixels, and its mask over a window of the picture."""

    label: int
    polygon: Polygon
    diameter: float
    left: int
    top: int
    mask: NDArray[np.uint8]
    """Window with a margin for the shadow; parts of it may lie outside the picture."""
    soft: Field
    """The same mask, blurred, in [0, 1]."""

    def window(self, size: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Return where the window meets the picture: (rows, columns) of the picture, then of the window."""
        height, width = self.mask.shape
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + height, size), min(self.left + width, size)
        return (slice(top, bottom), slice(left, right)), (
            slice(top - self.top, bottom - self.top),
            slice(left - self.left, right - self.left),
        )


def draw_scene(config: SceneConfig, draws: Draws) -> Scene:
    """Make one picture; the same draws give the same bytes."""
    palette = draws.pick(PALETTES)
    light = draws.uniform(0.0, math.tau)
    canvas = _ground(config, palette, draws)
    shapes = _place(config, draws)
    for shape in shapes:
        _cast_shadow(canvas, shape, light, config, draws)
        _paint(canvas, shape, light, palette, config, draws)
    limit = float(config.size)
    boxes = np.array([box_of(shape.polygon) for shape in shapes], dtype=np.float64).reshape(-1, 4)
    return Scene(
        image=_develop(canvas, light, config, draws),
        boxes=np.clip(boxes, 0.0, limit),
        labels=tuple(shape.label for shape in shapes),
    )


def _place(config: SceneConfig, draws: Draws) -> list[_Shape]:
    """Lay shapes one over the other, without hiding more of any than is allowed."""
    placed: list[_Shape] = []
    seen: list[NDArray[np.bool_]] = []
    for _ in range(draws.integer(*config.shapes)):
        label = draws.integer(0, len(CLASS_NAMES) - 1)
        diameter = _diameter(config, draws)
        for _ in range(PLACEMENT_TRIES):
            shape = _shape(label, diameter, config, draws)
            left_over = _uncovered(shape, placed, seen, config)
            if left_over is not None:
                placed.append(shape)
                seen = left_over
                break
    return placed


def _diameter(config: SceneConfig, draws: Draws) -> float:
    """Draw a size: first its range, then its logarithm within."""
    place = draws.uniform() * sum(share for share, _, _ in config.diameters)
    for share, low, high in config.diameters[:-1]:
        if place < share:
            return low * math.pow(high / low, draws.uniform())
        place -= share
    _, low, high = config.diameters[-1]
    return low * math.pow(high / low, draws.uniform())


def _shape(label: int, diameter: float, config: SceneConfig, draws: Draws) -> _Shape:
    """Turn, stretch and place a shape of the class, and draw its mask."""
    polygon = OUTLINES[CLASS_NAMES[label]](draws)
    ratio = math.sqrt(draws.uniform(1.0, config.stretch))
    angle = draws.uniform(0.0, math.tau)
    cosine, sine = math.cos(angle), math.sin(angle)
    x, y = polygon[:, 0] * (ratio * diameter / 2), polygon[:, 1] * (diameter / 2 / ratio)
    polygon = np.stack([x * cosine - y * sine, x * sine + y * cosine], axis=1)
    x1, y1, x2, y2 = box_of(polygon)
    edge_x, edge_y = (x2 - x1) * 0.2, (y2 - y1) * 0.2
    polygon += [
        draws.uniform(-edge_x - x1, config.size + edge_x - x2),
        draws.uniform(-edge_y - y1, config.size + edge_y - y2),
    ]
    x1, y1, x2, y2 = box_of(polygon)
    margin = math.ceil(4 + 0.25 * diameter)
    left, top = math.floor(x1) - margin, math.floor(y1) - margin
    width, height = math.ceil(x2) + margin - left, math.ceil(y2) + margin - top
    mask = _filled(polygon - [left, top], height, width)
    soft = _unit(cv2.GaussianBlur(mask, (0, 0), 0.8 + 0.03 * diameter))
    return _Shape(label=label, polygon=polygon, diameter=diameter, left=left, top=top, mask=mask, soft=soft)


def _corners(polygon: Polygon) -> NDArray[np.int32]:
    """Return the polygon in OpenCV's fixed-point coordinates of the larger mask, whose pixels' centres are whole."""
    corners: NDArray[np.int32] = np.rint((polygon * SUPERSAMPLING - 0.5) * (1 << SUBPIXEL_BITS)).astype(np.int32)
    return corners


def _filled(polygon: Polygon, height: int, width: int) -> NDArray[np.uint8]:
    """Return how much of every pixel lies inside the polygon, as 0 to 255; HW."""
    large = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    cv2.fillPoly(large, [_corners(polygon)], 255, cv2.LINE_8, SUBPIXEL_BITS)
    small: NDArray[np.uint8] = cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA)
    return small


def _uncovered(
    new: _Shape, placed: list[_Shape], seen: list[NDArray[np.bool_]], config: SceneConfig
) -> list[NDArray[np.bool_]] | None:
    """Return what stays visible of each shape (pictures of booleans) with the new one on top, None if too little."""
    place, part = new.window(config.size)
    solid = new.mask[part] > 127
    if np.count_nonzero(solid) < config.least_visible * area_of(new.polygon):
        return None
    left_over = []
    for shape, visible in zip(placed, seen, strict=True):
        kept = visible.copy()
        kept[place] &= ~solid
        if np.count_nonzero(kept) < config.least_visible * area_of(shape.polygon):
            return None
        left_over.append(kept)
    own = np.zeros((config.size, config.size), dtype=np.bool_)
    own[place] = solid
    return [*left_over, own]


def _ground(config: SceneConfig, palette: Palette, draws: Draws) -> NDArray[np.float32]:
    """Paint the background: two colours in clouds, a pattern, thin lines; 3HW, red first, in [0, 1]."""
    size = config.size
    first, second = palette.ground
    mix = clouds(size, size, draws.integer(1, 4), draws)
    canvas = _solid(first) + (_solid(second) - _solid(first)) * mix
    kind = draws.pick((*PATTERNS, "contours", "plain"))
    if kind != "plain":
        if kind == "contours":
            field = contours(size, size, draws)
        else:
            u, v = turned(size, size, draws.uniform(0.0, math.tau))
            field = PATTERNS[kind](u, v, draws.uniform(9.0, 46.0), draws)
        opacity = field * np.float32(config.pattern_contrast * draws.uniform(0.3, 1.0))
        _blend(canvas, _solid(_ground_ink(palette, draws)), opacity)
    strokes = np.zeros((size, size), dtype=np.uint8)
    for _ in range(draws.integer(0, config.threads)):
        curve = _thread(size, draws)
        cv2.polylines(strokes, [curve], False, draws.integer(80, 255), draws.integer(1, 2), cv2.LINE_AA, SUBPIXEL_BITS)
    _blend(canvas, _solid(draws.pick(palette.inks)), _unit(strokes) * np.float32(0.6))
    return canvas


def _thread(size: int, draws: Draws) -> NDArray[np.int32]:
    """Return a cubic curve across the picture, in OpenCV's fixed-point coordinates; N2."""
    ends = np.array([[draws.uniform(-0.3, 1.3) * size for _ in range(2)] for _ in range(4)])
    t = np.linspace(0.0, 1.0, 40)[:, None]
    s = 1.0 - t
    curve = s * s * s * ends[0] + 3.0 * s * s * t * ends[1] + 3.0 * s * t * t * ends[2] + t * t * t * ends[3]
    points: NDArray[np.int32] = np.rint(curve * (1 << SUBPIXEL_BITS)).astype(np.int32)
    return points


def _ground_ink(palette: Palette, draws: Draws) -> Colour:
    """Draw the colour of the ground's pattern: an ink, or the ground made lighter or darker."""
    if draws.chance(0.5):
        return draws.pick(palette.inks)
    return _towards(palette.ground[0], draws.pick((0.0, 1.0)), 0.7)


def _cast_shadow(canvas: NDArray[np.float32], shape: _Shape, light: float, config: SceneConfig, draws: Draws) -> None:
    """Darken what lies below the shape, softly and away from the light."""
    reach = 1.0 + draws.uniform(0.03, 0.07) * shape.diameter
    soft = np.roll(shape.soft, (round(-reach * math.sin(light)), round(-reach * math.cos(light))), (0, 1))
    place, part = shape.window(config.size)
    canvas[:, *place] *= np.float32(1.0) - soft[part] * np.float32(draws.uniform(0.25, 0.55))


def _paint(
    canvas: NDArray[np.float32], shape: _Shape, light: float, palette: Palette, config: SceneConfig, draws: Draws
) -> None:
    """Lay the shape on the canvas: its colours and pattern, its rim, its rounding in the light."""
    height, width = shape.mask.shape
    place, part = shape.window(config.size)
    colour = _ink(palette, config, draws)
    face = _face(colour, shape, palette, config, draws)
    if shape.diameter > config.plain_below and draws.chance(0.4):
        rim = _rim(shape, draws.uniform(0.03, 0.06) * shape.diameter)
        _blend(face, _solid(_towards(colour, draws.pick((0.0, 1.0)), draws.uniform(0.5, 0.9))), rim)
    x, _ = turned(height, width, light)
    slope = (x - x[height // 2, width // 2]) * np.float32(draws.uniform(0.05, 0.3) / shape.diameter)
    face *= _relief(shape, light, draws) + slope
    _blend(canvas[:, *place], face[:, *part], _unit(shape.mask[part]))


def _ink(palette: Palette, config: SceneConfig, draws: Draws) -> Colour:
    """Draw a colour that stands out from the ground."""
    middle = [(a + b) / 2 for a, b in zip(*palette.ground, strict=True)]
    inks = draws.shuffled(palette.inks)
    good = [ink for ink in inks if math.dist(ink, middle) >= config.least_contrast]
    shade = draws.uniform(-0.12, 0.12)
    return _towards((good or inks)[0], float(shade > 0), abs(shade))


def _face(colour: Colour, shape: _Shape, palette: Palette, config: SceneConfig, draws: Draws) -> NDArray[np.float32]:
    """Return the shape's surface over its window: plain, a gradient, mottled, or a pattern; 3HW."""
    height, width = shape.mask.shape
    kinds = ("plain", "gradient", "mottled", *PATTERNS, "stripes", "dots")
    kind = draws.pick(kinds if shape.diameter > config.plain_below else kinds[:2])
    other = draws.pick(palette.inks) if draws.chance(0.4) else _towards(colour, draws.pick((0.0, 1.0)), 0.35)
    strength = draws.uniform(0.45, 1.0)
    u, v = turned(height, width, draws.uniform(0.0, math.tau))
    if kind == "plain":
        field = np.zeros((height, width), dtype=np.float32)
    elif kind == "gradient":
        field = np.clip(
            (u - u[height // 2, width // 2]) * np.float32(1 / shape.diameter) + np.float32(0.5),
            np.float32(0.0),
            np.float32(1.0),
        )
    elif kind == "mottled":
        field = clouds(height, width, draws.integer(3, 7), draws)
    else:
        field = PATTERNS[kind](u, v, max(shape.diameter * draws.uniform(0.12, 0.3), 5.0), draws)
    base = _solid(colour)
    return base + (_solid(other) - base) * (field * np.float32(strength))


def _rim(shape: _Shape, thickness: float) -> Field:
    """Return how much of every pixel lies on a line along the outline; HW in [0, 1]."""
    height, width = shape.mask.shape
    large = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), dtype=np.uint8)
    corners = _corners(shape.polygon - [shape.left, shape.top])
    cv2.polylines(large, [corners], True, 255, max(round(2 * thickness * SUPERSAMPLING), 1), cv2.LINE_8, SUBPIXEL_BITS)
    return _unit(cv2.resize(large, (width, height), interpolation=cv2.INTER_AREA))


def _relief(shape: _Shape, light: float, draws: Draws) -> Field:
    """Return factors that brighten the edges that face the light and darken the others; HW."""
    reach = 1.0 + 0.03 * shape.diameter
    down, right = round(reach * math.sin(light)), round(reach * math.cos(light))
    lit = np.roll(shape.soft, (-down, -right), (0, 1)) - np.roll(shape.soft, (down, right), (0, 1))
    return np.float32(1.0) - lit * np.float32(draws.uniform(0.1, 0.35))


def _develop(canvas: NDArray[np.float32], light: float, config: SceneConfig, draws: Draws) -> NDArray[np.uint8]:
    """Light the whole picture unevenly, expose it, add grain; HW3 uint8, blue first."""
    size = config.size
    u, v = turned(size, size, light)
    u, v = (u - u[size // 2, size // 2]) / np.float32(size), (v - v[size // 2, size // 2]) / np.float32(size)
    fall_off = np.float32(draws.uniform(0.0, config.fall_off)) * u
    vignette = np.float32(draws.uniform(0.0, config.vignette)) * (u * u + v * v)
    grain = draws.bytes(2, size, size).astype(np.float32)
    speckle = (grain[0] + grain[1] - np.float32(255.0)) * np.float32(draws.uniform(0.005, config.noise))
    speckle += np.float32(0.5)
    light_here = (np.float32(1.0) + fall_off - vignette) * np.float32(255.0 * draws.uniform(*config.exposure))
    for plane in canvas:
        plane *= light_here
        plane += speckle
        np.clip(plane, np.float32(0.0), np.float32(255.0), out=plane)
    red, green, blue = canvas.astype(np.uint8)
    image: NDArray[np.uint8] = cv2.merge([blue, green, red])
    if draws.chance(config.blur):
        image = cv2.GaussianBlur(image, (3, 3), 0.8)
    return image


def _solid(colour: Colour) -> NDArray[np.float32]:
    """Return the colour as 311."""
    return np.array(colour, dtype=np.float32)[:, None, None]


def _towards(colour: Colour, target: float, share: float) -> Colour:
    """Mix the colour with black (0) or white (1)."""
    red, green, blue = (part + (target - part) * share for part in colour)
    return red, green, blue


def _unit(levels: NDArray[np.uint8]) -> Field:
    """Return levels of 0 to 255 as numbers in [0, 1]."""
    return levels.astype(np.float32) / np.float32(255.0)


def _blend(below: NDArray[np.float32], above: NDArray[np.float32], opacity: Field) -> None:
    """Cover `below` (3HW, changed in place) with `above` where `opacity` (HW) says so."""
    for plane, cover in zip(below, above, strict=True):
        change = cover - plane
        change *= opacity
        plane += change
