"""Decode: from image files to uint8 pixels on the device, upright, at full or reduced size.

The laws are those of `paceline.data.decode`. JPEG files are decoded by a codec at full size, then turned and averaged
on the device; whatever the codec refuses, and every other format, goes to the host's decoder, which has the last word
on what is broken.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
import torch

from paceline.data.images import BrokenImage

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.data.device.codec import Codec
    from paceline.data.images import Images
    from paceline.data.loader import TrainLoader

log = logging.getLogger("paceline")

_BATCH_IMAGES, _BATCH_BYTES = 128, 256 << 20
_PLANES = {"YCbCr": 3, "Gray": 1}


class BatchDecoder:
    """Decodes images of `loader` on `device`, those that `codec` leaves over in the threads of `pool`.

    The numbers of those that it refuses, or makes something else of, are added to `refused`.
    """

    def __init__(
        self, loader: TrainLoader, codec: Codec, device: torch.device, pool: Executor, refused: set[int] | None = None
    ) -> None:
        self.num_on_device = 0
        self._refused: set[int] = set() if refused is None else refused
        self._images = loader.images
        self._counters = loader.counters
        self._codec = codec
        self._device = device
        self._pool = pool
        self._said_refusal = False

    def stream(self, numbers: NDArray[np.int64]) -> Iterator[tuple[int, Tensor | BrokenImage]]:
        """Deliver images in order; the files of a batch are read while the one before it is decoded."""
        divided = batches(numbers, self._images.index.sizes[numbers])
        reading: list[Future[bytes | BrokenImage]] = []
        for batch, following in zip([[], *divided], [*divided, []], strict=True):
            encoded = [future.result() for future in reading]
            reading = [self._pool.submit(read, self._images, number) for number in following]
            yield from zip(batch, self.decode(batch, encoded), strict=True)

    def decode(self, numbers: Sequence[int], encoded: Sequence[bytes | BrokenImage]) -> list[Tensor | BrokenImage]:
        """Pixels of images, HW3 or HW, reduced, in order; a file that could not be read stays what it is."""
        out: list[Tensor | BrokenImage | None] = [file if isinstance(file, BrokenImage) else None for file in encoded]
        files = {place: file for place, file in enumerate(encoded) if not isinstance(file, BrokenImage)}
        planes = {place: planes_of(file) for place, file in files.items()}
        waiting = {
            place: self._pool.submit(self.by_host, numbers[place], files[place])
            for place, count in planes.items()
            if count == 0
        }
        for count in (3, 1):
            places = [place for place in files if planes[place] == count]
            answer = self._by_codec([files[place] for place in places], count)
            for place, pixels in zip(places, answer or [None] * len(places), strict=True):
                found = None if pixels is None else self._upright(numbers[place], pixels, count)
                if found is None:
                    if answer:
                        self._refused.add(numbers[place])
                    waiting[place] = self._pool.submit(self.by_host, numbers[place], files[place])
                else:
                    out[place] = found
                    self.num_on_device += 1
        for place, future in waiting.items():
            made = future.result()
            out[place] = made if isinstance(made, BrokenImage) else torch.from_numpy(made).to(self._device)
        return [result for result in out if result is not None]

    def by_host(self, number: int, encoded: bytes) -> NDArray[np.uint8] | BrokenImage:
        """Pixels of an image by the host's decoder, in memory that may be written to, or what is wrong with it."""
        try:
            return np.require(self._images.decoded(number, encoded), requirements=["C", "W"])
        except BrokenImage as broken:
            return broken

    def _by_codec(self, encoded: list[bytes], planes: int) -> list[Tensor | None]:
        """Ask the codec; empty where it fails as a whole, which says nothing about one of the files."""
        if not encoded:
            return []
        start = time.perf_counter()
        try:
            found = self._codec.decode(encoded, planes)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of the whole batch, whatever file it was
            if not self._said_refusal:
                self._said_refusal = True
                log.warning("Decoding on %s failed (%s): the host decodes what it fails at.", self._device, error)
            return []
        num_decoded = sum(pixels is not None for pixels in found)
        self._counters.add(decodes=num_decoded, decode_s=time.perf_counter() - start)
        return found

    def _upright(self, number: int, pixels: Tensor, planes: int) -> Tensor | None:
        """Turn and reduce; None where the pixels are not what the index says, which the host shall judge."""
        pixels = turned(pixels, int(self._images.index.orientation[number]))
        height, width = self._images.index.sizes[number].tolist()
        expected = (height, width) if planes == 1 else (height, width, 3)
        if pixels.dtype != torch.uint8 or pixels.shape != expected:
            return None
        return averaged(pixels, int(self._images.reductions[number]))


def planes_of(encoded: bytes) -> int:
    """Planes of a JPEG file that a codec may decode: 3, or 1 without colour; 0 for what is for the host.

    That is every other format, other colour spaces, and what is not quite right: the host says what is broken.
    """
    if not encoded.startswith(b"\xff\xd8") or encoded.rfind(b"\xff\xd9") < 0:
        return 0
    try:
        *_, colours, _ = simplejpeg.decode_jpeg_header(encoded)
    except ValueError:
        return 0
    return _PLANES.get(colours, 0)


def turned(pixels: Tensor, orientation: int) -> Tensor:
    """Apply EXIF orientation 1..8 to HW or HW3: swap the axes for 5..8, then mirror."""
    assert 1 <= orientation <= 8
    if orientation >= 5:
        pixels = pixels.transpose(0, 1)
    mirrored = [axis for axis, orientations in enumerate(((3, 4, 7, 8), (2, 3, 6, 7))) if orientation in orientations]
    return pixels.flip(mirrored) if mirrored else pixels


def averaged(pixels: Tensor, reduction: int) -> Tensor:
    """Mean over blocks of `reduction` px, the last row and column repeated to fill the last blocks."""
    if reduction == 1:
        return pixels
    for axis in (0, 1):
        missing = -pixels.shape[axis] % reduction
        if missing:
            last = pixels.narrow(axis, pixels.shape[axis] - 1, 1)
            pixels = torch.cat([pixels, last.repeat_interleave(missing, dim=axis)], dim=axis)
    height, width, *planes = pixels.shape
    blocks = pixels.reshape(height // reduction, reduction, width // reduction, reduction, *planes)
    sums = blocks.sum(dim=(1, 3), dtype=torch.int32)
    return ((sums + reduction * reduction // 2) // (reduction * reduction)).to(torch.uint8)


def read(images: Images, number: int) -> bytes | BrokenImage:
    """Bytes of a file, or what is wrong with it."""
    try:
        return images.encoded(number)
    except BrokenImage as broken:
        return broken


def batches(numbers: NDArray[np.int64], sizes: NDArray[np.integer[Any]]) -> list[list[int]]:
    """Divide images of `sizes` N2 into batches of so many, and of so many bytes unreduced; one image at least."""
    out: list[list[int]] = []
    room = 0
    for number, pixels in zip(numbers.tolist(), sizes.astype(np.int64).prod(axis=1).tolist(), strict=True):
        if not out or len(out[-1]) == _BATCH_IMAGES or 3 * pixels > room:
            out.append([])
            room = _BATCH_BYTES
        out[-1].append(number)
        room -= 3 * pixels
    return out
