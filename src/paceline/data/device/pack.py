"""Pack: a batch in one flat buffer, so that it goes to the device in one copy.

    [ table | targets | masks | crops, one after the other ]      every array starts at a multiple of 64 bytes
      fixed   few sizes  as many bytes as the pictures need

The device sees the arrays where they lie in its copy of the buffer. Where the decoded set is already on the device,
there are no crops: the table's starts then count from the beginning of that set.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch

from paceline.batch import Batch
from paceline.data.device.rectangles import ROW_BYTES, ROWS, SOURCE, STRIDE, TARGET, copy_rectangles
from paceline.data.device.table import Geometry, RenderTable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.data.augment import Transforms

    Pixels = NDArray[np.uint8]

_ALIGNMENT = 64
_TABLE = tuple(field.name for field in fields(RenderTable))
TARGETS = ("boxes", "labels", "valid", "samples", "original_hw")


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceTable:
    """A `RenderTable` as tensors on the device, with the same names and shapes."""

    starts: Tensor
    mask_starts: Tensor
    tiles_int: Tensor
    tiles_float: Tensor
    pictures_int: Tensor
    pictures_float: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Sources:
    """Where the decoded image of each tile lies in the host's memory; BT each, anything where a tile is absent."""

    addresses: NDArray[np.int64]
    heights: NDArray[np.integer]
    widths: NDArray[np.integer]
    planes: NDArray[np.integer]
    alive: object
    """What keeps the memory."""

    @classmethod
    def of(cls, images: Sequence[Sequence[Pixels | None]]) -> Sources:
        """Find images (B lists of T, HW3 or HW, None where a tile is absent) in memory."""
        kept = [[None if image is None else np.ascontiguousarray(image) for image in row] for row in images]
        facts = np.array(
            [
                (0, 1, 1, 1)
                if image is None
                else (image.__array_interface__["data"][0], *image.shape[:2], 3 if image.ndim == 3 else 1)
                for row in kept
                for image in row
            ],
            np.int64,
        ).reshape(len(images), -1, 4)
        addresses, heights, widths, planes = np.moveaxis(facts, -1, 0)
        return cls(addresses=addresses, heights=heights, widths=widths, planes=planes, alive=kept)


@dataclass(frozen=True, kw_only=True, eq=False)
class Resident:
    """Images that are on the device: where each tile's lies, BT each, in bytes from the beginning."""

    offsets: NDArray[np.int64]
    heights: NDArray[np.integer]
    widths: NDArray[np.integer]
    planes: NDArray[np.integer]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedBatch:
    """A batch on its way to the device."""

    buffer: Pixels
    """Flat; what lies behind `used` bytes means nothing."""
    used: int
    size: int
    """Side of the pictures, in pixels."""
    arrays: Mapping[str, tuple[int, np.dtype[np.generic], tuple[int, ...]]]
    """First byte, type and shape of each array in the buffer, by the names of `RenderTable` and `Batch`."""

    def __len__(self) -> int:
        return self.arrays["starts"][2][0]

    def move(self, starts: NDArray[np.int64]) -> None:
        """Let the table's starts BT, which count from each tile's own image, count from where these images begin."""
        first, dtype, shape = self.arrays["starts"]
        np.ndarray(shape, dtype, self.buffer.data, first)[...] += starts

    def opened(self, on_device: Tensor) -> tuple[DeviceTable, dict[str, Tensor]]:
        """Table and targets as views of the copy `on_device` (at least `used` bytes, uint8, flat) of the buffer."""
        whole = on_device[: len(on_device) // _ALIGNMENT * _ALIGNMENT]  # what lies behind is crops
        typed = {code: whole.view(dtype) for code, dtype in _TORCH.items()}
        views = {}
        for name, (start, dtype, shape) in self.arrays.items():
            first = start // dtype.itemsize
            views[name] = typed[dtype.str[1:]][first : first + math.prod(shape)].view(shape)
        table = DeviceTable(**{name: views[name] for name in _TABLE})
        return table, {name: views[name] for name in TARGETS}


_TORCH = {"i8": torch.int64, "i4": torch.int32, "f4": torch.float32, "b1": torch.bool}


@dataclass(frozen=True, kw_only=True, eq=False)
class Copies:
    """What is still to be copied into a packed batch: N rectangles, see `copy_rectangles`."""

    rectangles: NDArray[np.int64]
    alive: object
    """What keeps the memory that they are copied from."""

    @property
    def num_bytes(self) -> int:
        """Count what is copied."""
        return int((self.rectangles[:, ROW_BYTES] * self.rectangles[:, ROWS]).sum())

    def parts(self, count: int) -> list[Copies]:
        """Cut into at most so many parts, each of about as many bytes."""
        ends = np.cumsum(self.rectangles[:, ROW_BYTES] * self.rectangles[:, ROWS])
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) // count) if len(ends) else []
        parts = np.split(self.rectangles, cuts)
        return [Copies(rectangles=part, alive=self.alive) for part in parts if len(part)]

    def make(self) -> None:
        """Copy."""
        copy_rectangles(self.rectangles)


def packed(
    transforms: Transforms,
    sources: Sources | Resident,
    targets: Mapping[str, NDArray[np.generic]],
    buffer: Callable[[int], Pixels],
    masks: Mapping[tuple[int, int], Pixels] | None = None,
) -> PackedBatch:
    """Pack pictures and their targets, as `laid_out` does, with their pixels."""
    batch, copies = laid_out(transforms, sources, targets, buffer, masks)
    copies.make()
    return batch


def laid_out(
    transforms: Transforms,
    sources: Sources | Resident,
    targets: Mapping[str, NDArray[np.generic]],
    buffer: Callable[[int], Pixels],
    masks: Mapping[tuple[int, int], Pixels] | None = None,
) -> tuple[PackedBatch, Copies]:
    """Pack pictures and their targets (arrays of `Batch` by name, but for the images), and say what is to be copied.

    `buffer` gives a flat buffer of at least so many bytes; `masks` the opacity HW, in decoded pixels, of masked tiles
    by (picture, tile); a masked tile without one paints nothing.
    """
    if transforms.masked.any():
        unpainted = transforms.masked.copy()
        for place in masks or {}:
            unpainted[place] = False
        transforms = dataclasses.replace(transforms, sources=np.where(unpainted, -1, transforms.sources))
    geometry = Geometry(transforms, sources.heights, sources.widths)
    crops, planes = geometry.crops, sources.planes.astype(np.int64)
    pitches = sources.widths.astype(np.int64) * planes
    inside = crops.top * pitches + crops.left * planes  # bytes from an image to its crop
    mask_starts, mask_bytes = _mask_places(transforms.sources.shape, masks, crops.height * crops.width)
    if isinstance(sources, Resident):
        starts, crop_bytes = sources.offsets + inside, 0
    else:
        row_bytes = crops.width * planes
        starts, crop_bytes = _places(crops.height * row_bytes)
        pitches_there, pitches = pitches, row_bytes
    table = geometry.table(starts=starts, pitches=pitches, planes=planes, mask_starts=mask_starts)
    head = {name: np.asarray(getattr(table, name)) for name in _TABLE} | dict(targets)
    arrays, end = {}, 0
    for name, array in head.items():
        arrays[name] = (end, array.dtype, array.shape)
        end = _aligned(end + array.nbytes)
    first_mask, first_crop = end, end + mask_bytes
    out = buffer(first_crop + crop_bytes)
    if masks:
        table.mask_starts[mask_starts >= 0] += first_mask
    if isinstance(sources, Sources):
        np.add(table.starts, first_crop, out=table.starts, where=geometry.present)
    for name, array in head.items():
        np.ndarray(array.shape, array.dtype, out.data, arrays[name][0])[...] = array
    for place, mask in (masks or {}).items():
        if mask_starts[place] >= 0:
            top, left = int(crops.top[place]), int(crops.left[place])
            part = mask[top : top + int(crops.height[place]), left : left + int(crops.width[place])]
            start = int(table.mask_starts[place])
            out[start : start + part.size].reshape(part.shape)[...] = part
    rectangles = np.empty((0, 5), np.int64)
    if isinstance(sources, Sources):
        there = geometry.present.nonzero()
        rectangles = np.empty((len(there[0]), 5), np.int64)
        rectangles[:, SOURCE] = (sources.addresses + inside)[there]
        rectangles[:, STRIDE] = pitches_there[there]
        rectangles[:, ROW_BYTES] = row_bytes[there]
        rectangles[:, ROWS] = crops.height[there]
        rectangles[:, TARGET] = table.starts[there] + out.ctypes.data
    batch = PackedBatch(buffer=out, used=first_crop + crop_bytes, size=transforms.size, arrays=arrays)
    return batch, Copies(rectangles=rectangles, alive=sources)


def batch_of(images: Tensor, targets: Mapping[str, Tensor]) -> Batch:
    """Put drawn images and targets together."""
    return Batch(
        images=images,
        boxes=targets["boxes"],
        labels=targets["labels"],
        valid=targets["valid"],
        samples=targets["samples"],
        original_hw=targets["original_hw"],
    )


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _places(num_bytes: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """First byte of each of several parts that follow each other, and all their bytes."""
    rounded = -(-num_bytes.reshape(-1) // _ALIGNMENT) * _ALIGNMENT
    ends = np.cumsum(rounded)
    return (ends - rounded).reshape(num_bytes.shape), int(ends[-1]) if len(ends) else 0


def _mask_places(
    shape: tuple[int, ...], masks: Mapping[tuple[int, int], Pixels] | None, num_bytes: NDArray[np.int64]
) -> tuple[NDArray[np.int64], int]:
    """First byte of each tile's mask, from the first mask on; -1 where there is none."""
    if not masks:
        return np.full(shape, -1, np.int64), 0
    masked = np.zeros(shape, np.bool_)
    for place in masks:
        masked[place] = num_bytes[place] > 0
    starts, total = _places(np.where(masked, num_bytes, 0))
    return np.where(masked, starts, -1), total
