"""Plain: pictures that are nothing but tiles in their places, as tables of whole numbers for compiled code.

Most training pictures are: nothing is turned, mixed, cut in or pasted, and no source shrinks to less than a quarter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.native.picture import COLUMNS, LEAST_SIDE

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms


@dataclass(frozen=True, kw_only=True)
class Plain:
    """Of B pictures of up to T tiles which are plain, and what compiled code is told of them, see `draw_pictures`."""

    is_plain: NDArray[np.bool_]
    """B; the rest is of no meaning where a picture is not."""
    tiles: NDArray[np.int64]
    """BT9."""
    hsv: NDArray[np.float64]
    """B3, the hue's shift from 0 to 1."""
    mirrors: NDArray[np.bool_]
    """B2."""

    def put(self, row: int, other: Plain) -> None:
        """Overwrite one row by the only row of `other`."""
        for name, values in vars(self).items():
            values[row] = vars(other)[name][0]


def plain_of(transforms: Transforms) -> Plain:
    """Say which pictures are plain, and what they are made of."""
    size, seen = transforms.size, transforms.sources >= 0
    tiles = np.empty((*seen.shape, COLUMNS), np.int64)
    parts = transforms.visible.astype(np.int64) // transforms.reductions[..., None]
    tiles[..., :2] = parts[..., :2]
    tiles[..., 2] = parts[..., 3] - parts[..., 1]
    tiles[..., 3] = parts[..., 2] - parts[..., 0]
    tiles[..., 4] = transforms.halvings
    tiles[..., 5:] = transforms.places
    for axis in (0, 1):  # pictures are mirrored as a whole when they are painted
        rows = np.flatnonzero(transforms.flips[:, axis])
        tiles[rows[:, None], :, [5 + axis, 7 + axis]] = size - transforms.places[rows[:, None], :, [2 + axis, axis]]
    suits = (transforms.halvings <= 1) & ~transforms.masked
    suits &= (transforms.clips == (0, 0, size, size)).all(axis=-1)
    suits &= tiles[..., 2:4].min(axis=-1) >= LEAST_SIDE << transforms.halvings
    is_plain = (suits | ~seen).all(axis=1) & (transforms.shares == 1) & (transforms.cuts[:, 2] == 0)
    hsv = transforms.hsv.copy()
    hsv[:, 0] %= 1
    return Plain(is_plain=is_plain & transforms.aligned, tiles=tiles, hsv=hsv, mirrors=transforms.flips.copy())
