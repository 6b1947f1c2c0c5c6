"""Resident: the whole decoded set on the device, uploaded once; batches then carry numbers, not pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from paceline.data.device.pack import Resident, Sources

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_UPLOAD_BYTES = 256 << 20


class FlatImages(Protocol):
    """All N decoded images of a set one after the other, as `paceline.data.images` hands them out."""

    @property
    def flat(self) -> NDArray[np.uint8]:
        """The bytes of all images."""

    @property
    def offsets(self) -> NDArray[np.int64]:
        """N, first byte of each."""

    @property
    def heights(self) -> NDArray[np.int32]:
        """N, of the decoded image; 0 where there is none."""

    @property
    def widths(self) -> NDArray[np.int32]:
        """N, of the decoded image."""

    @property
    def planes(self) -> NDArray[np.int32]:
        """N, 3 or, without colour, 1."""


def uploaded(images: FlatImages, device: torch.device) -> Tensor:
    """Copy the bytes of all images to the device, part by part, once."""
    out = torch.empty(len(images.flat), dtype=torch.uint8, device=device)
    for start in range(0, len(images.flat), _UPLOAD_BYTES):
        part = images.flat[start : start + _UPLOAD_BYTES]
        out[start : start + len(part)] = torch.from_numpy(part if part.flags.writeable else part.copy())
    return out


def resident(images: FlatImages, numbers: NDArray[np.int64]) -> Resident:
    """Find the images `numbers` BT (-1 for none) of an uploaded set."""
    safe = np.maximum(numbers, 0)
    return Resident(
        offsets=images.offsets[safe],
        heights=images.heights[safe],
        widths=images.widths[safe],
        planes=images.planes[safe],
    )


def in_memory(images: FlatImages, numbers: NDArray[np.int64]) -> Sources:
    """Find the images `numbers` BT (-1 for none) of a set in the host's memory, without looking at them one by one."""
    safe = np.maximum(numbers, 0)
    return Sources(
        addresses=images.offsets[safe] + images.flat.ctypes.data,
        heights=images.heights[safe],
        widths=images.widths[safe],
        planes=images.planes[safe],
        alive=images,
    )
