"""Letterbox: how an image of any size sits inside the network's input, and the way back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Letterbox:
    """An image of `height` x `width` scaled into a canvas, centred, the rest grey; all lengths in pixels.

    The scaled image covers whole pixels, so its two scales differ by less than one pixel over its length;
    boxes use these exact scales, which makes `inverse(forward(boxes))` the identity up to rounding.
    """

    height: int
    width: int
    canvas_height: int
    canvas_width: int
    scaled_height: int
    scaled_width: int
    top: int
    left: int

    @classmethod
    def fit(cls, height: int, width: int, canvas_height: int, canvas_width: int) -> Self:
        """Scale the image, up or down, to the largest size that the canvas holds, and centre it."""
        scale = min(canvas_height / height, canvas_width / width)
        scaled_height = min(max(round(height * scale), 1), canvas_height)
        scaled_width = min(max(round(width * scale), 1), canvas_width)
        return cls(
            height=height,
            width=width,
            canvas_height=canvas_height,
            canvas_width=canvas_width,
            scaled_height=scaled_height,
            scaled_width=scaled_width,
            top=(canvas_height - scaled_height) // 2,
            left=(canvas_width - scaled_width) // 2,
        )

    @property
    def scale_x(self) -> float:
        """Canvas pixels per image pixel along x."""
        return self.scaled_width / self.width

    @property
    def scale_y(self) -> float:
        """Canvas pixels per image pixel along y."""
        return self.scaled_height / self.height

    def forward(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map boxes N4 (xyxy, image pixels) to canvas pixels."""
        scale = np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])
        mapped: NDArray[np.float64] = boxes * scale + np.array(
            [self.left, self.top, self.left, self.top], dtype=np.float64
        )
        return mapped

    def inverse(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Map boxes N4 (xyxy, canvas pixels) back to image pixels, clipped to the image."""
        scale = np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y])
        inside = (boxes - np.array([self.left, self.top, self.left, self.top], dtype=np.float64)) / scale
        limit = np.array([self.width, self.height, self.width, self.height], dtype=np.float64)
        clipped: NDArray[np.float64] = np.clip(inside, 0.0, limit)
        return clipped
