"""Mixing: which second picture joins a picture, as a blend or in a rectangle, and what that leaves of boxes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.draws import keys, numbers
from paceline.data.slots import Slot

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.config import AugmentConfig

_BETA = 32
_SLIVER_PX = 0.5
"""Less than this of a box beside a rectangle, whose edges are those of pixels, shows in none of them."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """What becomes of B pictures; none is both mixed and cut."""

    mixed: NDArray[np.bool_]
    """B, blended with the second picture."""
    cut: NDArray[np.bool_]
    """B, has a part of the second picture in a rectangle."""
    shares: NDArray[np.float64]
    """B, share of the first picture in the blend; 1 where none is."""
    cuts: NDArray[np.int64]
    """B4, the rectangle, xyxy in pixels of the picture; zeros where there is none."""


def mix(config: AugmentConfig, size: int, draws: NDArray[np.float64]) -> Mixing:
    """Decide by numbers BS; a picture that is blended is not cut."""
    mixed = draws[:, Slot.MIXUP] < config.mixup
    cut = (draws[:, Slot.CUTMIX] < config.cutmix) & ~mixed
    shares, cuts = np.ones(len(draws)), np.zeros((len(draws), 4), np.int64)
    if mixed.any():
        shares[mixed] = beta_shares(keys(draws[mixed, Slot.SHARE]))
    if cut.any():
        cuts[cut] = cut_rectangles(size, keys(draws[cut, Slot.CUT]))
        cut &= (cuts[:, 2:] > cuts[:, :2]).all(axis=1)
        cuts[~cut] = 0
    return Mixing(mixed=mixed, cut=cut, shares=shares, cuts=cuts)


def beta_shares(keys: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Shares B from Beta(32, 32), exactly: the 32nd smallest of 63 uniform numbers has that distribution.

    The k-th smallest of n independent uniform numbers follows Beta(k, n + 1 - k) (David and Nagaraja: Order Statistics,
    3rd edition, section 2.1).
    """
    shares: NDArray[np.float64] = np.median(numbers(keys, 2 * _BETA - 1), axis=1)
    return shares


def cut_rectangles(size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Rectangles B4 (xyxy, whole pixels), of any share of the picture, around any of its points, cut at its border.

    As CutMix has them (Yun et al., ICCV 2019): the picture's own proportions, an area drawn uniformly before the cut.
    """
    area, *centre = numbers(keys, 3).T
    half, middle = np.sqrt(area)[:, None] * (size / 2), np.stack(centre, axis=1) * size
    edges = np.concatenate([middle - half, middle + half], axis=1)
    cuts: NDArray[np.int64] = np.clip(np.rint(edges), 0, size).astype(np.int64)
    return cuts


def trim(boxes: NDArray[np.float64], cuts: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds M4 of what rectangles `cuts` M4 leave of boxes M4, and the area M of that.

    A rectangle that covers only a corner or the middle of a box leaves its bounds as they are.
    """
    left, top, right, bottom = boxes.T.copy()
    first_x, first_y, last_x, last_y = cuts.T.astype(np.float64)
    wide = (first_x < left + _SLIVER_PX) & (last_x > right - _SLIVER_PX)
    tall = (first_y < top + _SLIVER_PX) & (last_y > bottom - _SLIVER_PX)
    hidden = np.maximum(np.minimum(right, last_x) - np.maximum(left, first_x), 0)
    hidden *= np.maximum(np.minimum(bottom, last_y) - np.maximum(top, first_y), 0)
    visible = (right - left) * (bottom - top) - hidden
    top, bottom = (
        np.where(wide & (first_y < top + _SLIVER_PX), np.clip(last_y, top, bottom), top),
        np.where(wide & (last_y > bottom - _SLIVER_PX), np.clip(first_y, top, bottom), bottom),
    )
    left, right = (
        np.where(tall & (first_x < left + _SLIVER_PX), np.clip(last_x, left, right), left),
        np.where(tall & (last_x > right - _SLIVER_PX), np.clip(first_x, left, right), right),
    )
    # What is covered as a whole has its far edge before its near one.
    return np.stack([left, top, np.maximum(right, left), np.maximum(bottom, top)], axis=1), visible
