"""Table: what the device has to know to draw a batch, as arrays of fixed shapes; no pixels here.

A tile's crop is the part of its decoded image that the picture can show. The kernel averages blocks of 2^halvings
pixels along each axis while it samples, so a crop is counted in such blocks, and ships as the source has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.render import FIRST_OF_SECOND

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms

_EVERYWHERE = np.array((-1e9, -1e9, 1e9, 1e9))
_SIXTHS = np.array((6.0, 1.0, 1.0))
_SEAM = 1 / 512
"""By how much an outline is widened, in blocks: rounding to float32 leaves no gap between tiles that share a border."""


class TileInt(IntEnum):
    """Columns of `tiles_int`."""

    LEFT = 0
    """Of the rectangle that the tile may paint, xyxy in output pixels; all 0 where there is no tile."""
    TOP = 1
    RIGHT = 2
    BOTTOM = 3
    HEIGHT = 4
    """Of the crop, in blocks."""
    WIDTH = 5
    PITCH = 6
    """Bytes from one row of decoded pixels to the next."""
    PLANES = 7
    HALVINGS = 8
    LAYER = 9
    YIELDS = 10
    """1 where the tile leaves out its picture's cut."""
    MASK_PITCH = 11


class TileFloat(IntEnum):
    """Columns of `tiles_float`; the first nine are the rows of the map from output pixels to blocks of the crop."""

    MAP = 0
    SEEN = 9
    """The tile's outline, xyxy in blocks of the crop."""
    COUNT = 13


class PictureInt(IntEnum):
    """Columns of `pictures_int`."""

    GREY = 0
    SWAP = 1
    CUT = 4
    """xyxy in output pixels; all 0 where nothing is cut."""
    COUNT = 8


class PictureFloat(IntEnum):
    """Columns of `pictures_float`."""

    HUE = 0
    """In sixths of a turn."""
    SATURATION = 1
    VALUE = 2
    SHARE = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class Crops:
    """The part of each tile's decoded image that is shipped, in decoded pixels; BT each, zeros without a tile."""

    left: NDArray[np.int64]
    top: NDArray[np.int64]
    height: NDArray[np.int64]
    width: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class RenderTable:
    """B pictures of T tiles."""

    starts: NDArray[np.int64]
    """BT, first byte of the crop in the sources' buffer."""
    mask_starts: NDArray[np.int64]
    """BT, first byte of the crop's mask in the masks' buffer; -1 where the tile is not masked."""
    tiles_int: NDArray[np.int32]
    """BT x `TileInt`."""
    tiles_float: NDArray[np.float32]
    """BT x `TileFloat`."""
    pictures_int: NDArray[np.int32]
    """B x `PictureInt`."""
    pictures_float: NDArray[np.float32]
    """B x `PictureFloat`."""


def inverted(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverses of maps ...33 by the adjugate: a few calls for the whole batch; what has no inverse gives zeros."""
    (a, b, c), (d, e, f), (g, h, i) = (tuple(np.moveaxis(matrices[..., row, :], -1, 0)) for row in range(3))
    adjugate = np.stack(
        [
            *(e * i - f * h, c * h - b * i, b * f - c * e),
            *(f * g - d * i, a * i - c * g, c * d - a * f),
            *(d * h - e * g, b * g - a * h, a * e - b * d),
        ],
        axis=-1,
    )
    determinant = a * adjugate[..., 0] + b * adjugate[..., 3] + c * adjugate[..., 6]
    scale = np.divide(1.0, determinant, out=np.zeros_like(determinant), where=determinant != 0)
    inverse: NDArray[np.float64] = (adjugate * scale[..., None]).reshape(matrices.shape)
    return inverse


def inverted_aligned(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverses of maps ...33 that only scale and shift along the axes; what has no inverse gives zeros there."""
    flat = matrices.reshape(*matrices.shape[:-2], 9)
    scales, shifts = flat[..., 0:5:4], flat[..., 2:6:3]
    inverse = np.zeros_like(flat)
    back = inverse[..., 0:5:4]
    np.divide(1.0, scales, out=back, where=scales != 0)
    np.multiply(shifts, back, out=inverse[..., 2:6:3])
    np.negative(inverse[..., 2:6:3], out=inverse[..., 2:6:3])
    inverse[..., 8] = 1.0
    return inverse.reshape(matrices.shape)


class Geometry:
    """Crops and maps of a batch, which need the transforms and the sizes of the decoded images, not their pixels."""

    def __init__(self, transforms: Transforms, heights: NDArray[np.integer], widths: NDArray[np.integer]) -> None:
        """Take decoded sizes BT in pixels; those of absent tiles do not matter."""
        self.transforms = transforms
        self.present = transforms.sources >= 0
        clips, places = transforms.clips, transforms.places
        low_px, high_px = np.maximum(places[..., :2], clips[..., :2]), np.minimum(places[..., 2:], clips[..., 2:])
        self.present &= (high_px > low_px).all(axis=-1)
        self.paint = np.where(self.present[..., None], np.concatenate([low_px, high_px], axis=-1), 0)
        self.unit = (transforms.reductions << transforms.halvings).astype(np.float64)
        limit = np.empty((*widths.shape, 2), np.int64)
        limit[..., 0], limit[..., 1] = widths, heights
        limit >>= transforms.halvings[..., None]
        np.maximum(limit, 1, out=limit)
        inverse = inverted_aligned(transforms.matrices) if transforms.aligned else inverted(transforms.matrices)
        inverse[..., :2, :] /= self.unit[..., None, None]
        self.seen = transforms.visible / self.unit[..., None]
        low = np.clip(np.floor(self.seen[..., :2]), 0, limit - 1)
        high = np.clip(np.ceil(self.seen[..., 2:]), low + 1, limit)
        if not transforms.aligned:
            low, high = _tightened(inverse, self.paint, low, high)
        self._low, self._blocks = low, (high - low).astype(np.int64)
        inverse[..., :2, :] -= low[..., None] * inverse[..., 2:, :]  # the crop's own corner becomes the origin
        self.maps = inverse
        zero = ~self.present
        left_top = low.astype(np.int64) << transforms.halvings[..., None]
        extent = self._blocks << transforms.halvings[..., None]
        left_top[zero], extent[zero] = 0, 0
        self.crops = Crops(left=left_top[..., 0], top=left_top[..., 1], height=extent[..., 1], width=extent[..., 0])

    def table(
        self,
        *,
        starts: NDArray[np.int64],
        pitches: NDArray[np.integer],
        planes: NDArray[np.integer],
        mask_starts: NDArray[np.int64] | None = None,
    ) -> RenderTable:
        """Put the table together; where the sources lie is given as BT each. Masks lie as densely as their crops."""
        transforms = self.transforms
        tiles_int = np.zeros((*starts.shape, len(TileInt)), np.int32)
        tiles_int[..., :4] = self.paint
        tiles_int[..., TileInt.HEIGHT], tiles_int[..., TileInt.WIDTH] = self._blocks[..., 1], self._blocks[..., 0]
        tiles_int[..., TileInt.PITCH] = pitches
        tiles_int[..., TileInt.PLANES] = planes
        tiles_int[..., TileInt.HALVINGS] = transforms.halvings
        tiles_int[..., TileInt.LAYER] = transforms.layers
        tiles_int[:, :FIRST_OF_SECOND, TileInt.YIELDS] = 1
        tiles_int[..., TileInt.MASK_PITCH] = self.crops.width
        tiles_float = np.empty((*starts.shape, TileFloat.COUNT), np.float32)
        tiles_float[..., :9] = self.maps.reshape(*starts.shape, 9)
        if transforms.aligned:  # the rectangle to paint is the outline
            tiles_float[..., 9:] = _EVERYWHERE
        else:
            corner = np.tile(self._low, 2)
            tiles_float[..., 9:] = self.seen - corner + (-_SEAM, -_SEAM, _SEAM, _SEAM)
        pictures_int = np.zeros((len(transforms), PictureInt.COUNT), np.int32)
        pictures_int[:, PictureInt.GREY] = transforms.grey
        pictures_int[:, PictureInt.SWAP : PictureInt.SWAP + 3] = transforms.swaps
        pictures_int[:, PictureInt.CUT :] = transforms.cuts
        pictures_float = np.empty((len(transforms), len(PictureFloat)), np.float32)
        pictures_float[:, :3] = transforms.hsv * _SIXTHS
        pictures_float[:, PictureFloat.SHARE] = transforms.shares
        return RenderTable(
            starts=np.where(self.present, starts, 0),
            mask_starts=np.full(starts.shape, -1, np.int64) if mask_starts is None else mask_starts,
            tiles_int=tiles_int,
            tiles_float=tiles_float,
            pictures_int=pictures_int,
            pictures_float=pictures_float,
        )


def _tightened(
    inverse: NDArray[np.float64], paint: NDArray[np.int64], low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Cut crops (low and high BT2, in blocks) to what the painted rectangle can reach, and one block around it."""
    x, y = paint[..., [0, 2, 2, 0]], paint[..., [1, 1, 3, 3]]
    corners = np.stack([x, y, np.ones_like(x)], axis=-1) @ np.swapaxes(inverse, -1, -2)
    near = corners[..., 2:].min(axis=-2) > 0  # a rectangle that reaches behind the horizon bounds nothing
    reached = corners[..., :2] / np.where(near[..., None, :], corners[..., 2:], 1)
    first = np.clip(np.floor(reached.min(axis=-2) - 1), low, high - 1)
    last = np.clip(np.ceil(reached.max(axis=-2) + 1), first + 1, high)
    return np.where(near, first, low), np.where(near, last, high)
