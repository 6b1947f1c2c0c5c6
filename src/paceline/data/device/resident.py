"""Resident: the whole decoded set on the device, brought there once; batches then carry numbers, not pixels."""

from __future__ import annotations

import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from paceline.data import room
from paceline.data.device.decode import BatchDecoder
from paceline.data.device.pack import Resident, Sources
from paceline.data.images import BrokenImage
from paceline.errors import UserError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.data.device.codec import Codec
    from paceline.data.loader import TrainLoader

log = logging.getLogger("paceline")

_UPLOAD_BYTES = 256 << 20
_WELL_USED = 0.9


class ImageTable(Protocol):
    """Where N decoded images lie, one after the other."""

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


class FlatImages(ImageTable, Protocol):
    """All decoded images of a set in the host's memory, as `paceline.data.images` hands them out."""

    @property
    def flat(self) -> NDArray[np.uint8]:
        """The bytes of all images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceImages:
    """All decoded images of a set on the device; an `ImageTable`."""

    pixels: Tensor
    """The bytes of all images."""
    offsets: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    planes: NDArray[np.int32]

    @classmethod
    def of(cls, images: FlatImages, device: torch.device) -> DeviceImages:
        """Upload all images."""
        return cls(
            pixels=uploaded(images, device),
            offsets=images.offsets,
            heights=images.heights,
            widths=images.widths,
            planes=images.planes,
        )


def uploaded(images: FlatImages, device: torch.device) -> Tensor:
    """Copy the bytes of all images to the device, part by part, once."""
    out = torch.empty(len(images.flat), dtype=torch.uint8, device=device)
    for start in range(0, len(images.flat), _UPLOAD_BYTES):
        part = images.flat[start : start + _UPLOAD_BYTES]
        out[start : start + len(part)] = torch.from_numpy(part if part.flags.writeable else part.copy())
    return out


def decoded(loader: TrainLoader, codec: Codec, device: torch.device) -> DeviceImages:
    """Decode all images of a loader on the device, in the order of the index, without keeping them on the host.

    Room is made for three planes of each, and given back where a tenth of it or more was not needed. Raises UserError
    where it does not fit, or too many images are broken.
    """
    bound = room.decoded_bytes(loader.index.sizes, loader.images.reductions)
    try:
        pixels = torch.empty(bound, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"cache=device needs {bound / 1e9:.1f} GB on {device}, which has not as much left; choose cache=auto."
        ) from error
    count, used = len(loader.index), 0
    offsets = np.zeros(count, np.int64)
    heights, widths, planes = (np.zeros(count, np.int32) for _ in range(3))
    with ThreadPoolExecutor(loader.num_threads, thread_name_prefix="paceline-data") as pool:
        decoder = BatchDecoder(loader, codec, device, pool)
        for number, image in decoder.stream(np.arange(count)):
            if isinstance(image, BrokenImage):
                loader.take_out(image)
                continue
            offsets[number], heights[number], widths[number] = used, image.shape[0], image.shape[1]
            planes[number] = 1 if image.ndim == 2 else image.shape[2]
            pixels[used : used + image.numel()].view(image.shape).copy_(image)
            used += image.numel()
    if used < _WELL_USED * bound:
        with contextlib.suppress(torch.OutOfMemoryError):  # then it keeps the room that it has
            pixels = pixels[:used].clone()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # batches are drawn in a stream of their own
    level = logging.INFO if decoder.num_on_device else logging.WARNING
    log.log(level, "%s decoded %d of %d images, the host the others.", device, decoder.num_on_device, count)
    return DeviceImages(pixels=pixels, offsets=offsets, heights=heights, widths=widths, planes=planes)


def resident(images: ImageTable, numbers: NDArray[np.int64]) -> Resident:
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
