"""Batch: images with their padded ground truth, the only thing that rooms exchange."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B images and their ground truth, padded to G boxes each, so that every shape is known beforehand.

    The number G comes from a short list of sizes (see `paceline.data.loader`), and no box is ever left out for want
    of room. Entries where `valid` is False are zeros and mean nothing.
    """

    images: Tensor
    """B3HW, RGB, channels-last in memory: uint8 in [0, 255], or already in [0, 1], of the type that is computed in."""
    boxes: Tensor
    """BG4, float32, xyxy in pixels of the network's input."""
    labels: Tensor
    """BG, int64, class numbers from 0."""
    valid: Tensor
    """BG, bool, True where there is a box."""
    samples: Tensor
    """B, int64, row of each image in its index; -1 for an image that only fills up the batch (evaluation)."""
    original_hw: Tensor
    """B2, int64, height and width of each image file in pixels, after EXIF rotation; 1 x 1 for filling images."""

    def __len__(self) -> int:
        return self.images.shape[0]

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the network's input, in pixels."""
        return self.images.shape[2], self.images.shape[3]

    def network_input(self, dtype: torch.dtype | None = None) -> Tensor:
        """Images B3HW in [0, 1], in the same memory format, of a floating type; None: float32, or as they are.

        A type of 16 bits is made without a copy in float32 on the way; its numbers are those of the copy, rounded.
        """
        images = self.images
        if images.is_floating_point():
            return images if dtype is None else images.to(dtype)
        if dtype is None or dtype.itemsize > 4:
            images = images.float().div_(255.0)
            return images if dtype is None else images.to(dtype)
        return images.to(dtype).div_(255.0)

    def rows(self, start: int, stop: int) -> Self:
        """Return some of its images as a batch that looks at the same memory."""
        return type(self)(**{field.name: getattr(self, field.name)[start:stop] for field in fields(self)})

    def channels_first(self) -> Self:
        """Return the batch with its images laid out row by row of one channel after the other; a copy of them."""
        return replace(self, images=self.images.contiguous())

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """Return the batch with every tensor on `device`."""
        moved = {field.name: getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)}
        return type(self)(**moved)
