"""Sizes: which shapes pictures have: of one step of training, of one batch of evaluation."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.draws import hashed

if TYPE_CHECKING:
    from numpy.typing import NDArray

STRIDE = 32
"""Sides of the network's input are multiples of this."""
MOST_SIZES = 5
"""Sizes that training draws from: each is a shape to compile and to allocate for."""
MOST_SHAPES = 6
"""Shapes that batches of evaluation have, for the same reason."""
_STEP_OF_SIZES = 0x517E


def sizes_of(imgsz: int, share: float) -> tuple[int, ...]:
    """Sides that training draws from, rising: up to five multiples of 32 within ± `share` of `imgsz`, and `imgsz`."""
    first, last = -(-imgsz * (1 - share) // STRIDE), imgsz * (1 + share) // STRIDE
    sides = {round(number) * STRIDE for number in np.linspace(max(first, 1), last, MOST_SIZES)}
    if imgsz not in sides:  # it takes the place of the one next to it
        sides.discard(min(sides, key=lambda side: (abs(side - imgsz), side)))
        sides.add(imgsz)
    return tuple(sorted(sides))


def size_of_step(sizes: tuple[int, ...], seed: int, step: int) -> int:
    """Side of the pictures of a step: one of `sizes`, each as likely, by (seed, step) alone."""
    return sizes[int(hashed(seed, _STEP_OF_SIZES, step)[0] % np.uint64(len(sizes)))]


def rect_shapes(sizes: NDArray[np.integer[Any]], imgsz: int, batch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order N of images of `sizes` N2 (height, width), from wide to tall, and shape S2 of each batch of `batch`.

    A shape holds each of its images with its long side scaled to `imgsz`, as the square would; its sides are multiples
    of 32. Where there are too many shapes, those of neighbours are joined that cost the least grey.
    """
    scaled = sizes * (imgsz / sizes.max(axis=1))[:, None]
    needed = np.minimum(np.ceil(scaled - 1e-6).astype(np.int64), imgsz)
    order = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")
    starts = np.arange(0, len(order), batch)
    tallest = np.maximum.reduceat(needed[order], starts, axis=0)
    shapes = np.maximum(-(-tallest // STRIDE) * STRIDE, STRIDE)
    return order, _joined(shapes)


def _joined(shapes: NDArray[np.int64]) -> NDArray[np.int64]:
    """Shapes S2 of batches, by aspect, each grown to one of few."""
    groups: list[tuple[tuple[int, int], list[int]]] = []
    for number, shape in enumerate(map(tuple, shapes.tolist())):
        if groups and groups[-1][0] == shape:
            groups[-1][1].append(number)
        else:
            groups.append((shape, [number]))
    while len({shape for shape, _ in groups}) > MOST_SHAPES:
        costs = [_cost(first, second) for first, second in pairwise(groups)]
        place = int(np.argmin(costs))
        first, second = groups[place], groups.pop(place + 1)
        groups[place] = (_hull(first[0], second[0]), first[1] + second[1])
    grown = shapes.copy()
    for shape, numbers in groups:
        grown[numbers] = shape
    return grown


def _hull(first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    return max(first[0], second[0]), max(first[1], second[1])


def _cost(first: tuple[tuple[int, int], list[int]], second: tuple[tuple[int, int], list[int]]) -> int:
    """Pixels of a picture, times batches, that two groups grow by when they are joined."""
    height, width = _hull(first[0], second[0])
    return sum((height * width - shape[0] * shape[1]) * len(numbers) for shape, numbers in (first, second))
