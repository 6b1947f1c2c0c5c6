"""Decode: from the bytes of an image file to uint8 pixels, upright, at full or reduced size.

Reduction by d in {1, 2, 4, 8} keeps one law: pixel i of the reduced image covers the pixels [i * d, (i + 1) * d) of the
source, so a place x of the source is x / d of the reduced image, also where d does not divide the size (the last pixel
then covers less than d). JPEG does this while decoding, at a fraction of the cost; others are averaged afterwards.

Ordinary JPEG goes through a decoder of our own; what that refuses, through simplejpeg; what that refuses, and every
other format, through OpenCV, which has the last word on what is broken. Who decodes a file changes no pixel.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import simplejpeg

from paceline.data.headers import UNDECODABLE, BadImage
from paceline.data.raw import from_raw, is_raw
from paceline.data.tiff_tags import is_deep_grey, is_tiff, is_white_zero, tags_of, with_stored_colours
from paceline.native.jpeg import decode_jpeg

if TYPE_CHECKING:
    from numpy.typing import NDArray

REDUCTIONS = (1, 2, 4, 8)
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
_LEAST_REDUCED_PX = 8
"""Images up to this long have the same size at several of the JPEG decoder's reductions."""
_JPEG_END, _PNG_END = b"\xff\xd9", b"IEND"


def reductions(sizes: NDArray[np.integer[Any]], imgsz: int, *, dividing: bool = False) -> NDArray[np.int64]:
    """Largest reductions N that leave the long side of images of `sizes` N2 (height, width) at `imgsz` px or more.

    With `dividing` only those that divide both sides, for which the reduced image covers exactly the source.
    """
    chosen = np.ones(len(sizes), dtype=np.int64)
    for reduction in REDUCTIONS[1:]:
        fits = sizes.max(axis=1) >= reduction * imgsz
        if dividing:
            fits &= (sizes % reduction == 0).all(axis=1)
        chosen[fits] = reduction
    return chosen


def decode(source: Path | str | bytes, orientation: int = 1, reduction: int = 1) -> NDArray[np.uint8]:
    """Decode the file (a path, or its bytes) to RGB pixels HW3.

    `orientation` is the EXIF number 1..8 of the file and is applied here, once. Raises `BadImage`.
    """
    pixels = decode_compact(source, orientation, reduction)
    return pixels if pixels.ndim == 3 else cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB)


def decode_compact(source: Path | str | bytes, orientation: int = 1, reduction: int = 1) -> NDArray[np.uint8]:
    """Like `decode`, but files without colour stay one plane HW: a third of the memory and of the work."""
    return _decode(_read(source), orientation, reduction)


def _decode(encoded: bytes, orientation: int, reduction: int) -> NDArray[np.uint8]:
    """Pixels HW or HW3; those of a raw image are a view of its bytes, not to be written to."""
    if is_raw(encoded):
        return _further_reduced(encoded, reduction)
    is_jpeg = encoded.startswith(b"\xff\xd8")
    upright = orientation == 1 or is_tiff(encoded)  # OpenCV turns TIFF files by itself
    in_decoder = reduction if is_jpeg and upright else 1
    pixels = _decode_jpeg(encoded, in_decoder) if is_jpeg else None
    if pixels is None:
        pixels = _imdecode(encoded, in_decoder)
    if not upright:
        pixels = _turn(pixels, orientation)
    return pixels if in_decoder == reduction else _average(pixels, reduction)


def _further_reduced(content: bytes, reduction: int) -> NDArray[np.uint8]:
    """Pixels of a raw image, which may be reduced already, at the reduction that is asked for."""
    pixels, reduced = from_raw(content)
    if reduction % reduced:
        raise BadImage(f"was reduced by {reduced}, and is wanted at {reduction}")
    return pixels if reduction == reduced else _average(pixels, reduction // reduced)


def _decode_jpeg(encoded: bytes, reduction: int) -> NDArray[np.uint8] | None:
    """Pixels HW or HW3 in file orientation; None where OpenCV has to look: CMYK, and whatever is not quite right."""
    if (ours := decode_jpeg(encoded, reduction)) is not None:
        return ours
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        if colours not in ("Gray", "YCbCr", "RGB") or (reduction > 1 and max(height, width) <= _LEAST_REDUCED_PX):
            return None
        # It takes the smallest of its sizes, n/8 of the full one, that is no less than this: exactly this.
        least = (-(-height // reduction), -(-width // reduction)) if reduction > 1 else (0, 0)
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            encoded, "GRAY" if colours == "Gray" else "RGB", min_height=least[0], min_width=least[1]
        )
    except ValueError:
        return None
    assert reduction == 1 or pixels.shape[:2] == least
    return pixels[..., 0] if colours == "Gray" else pixels


def _read(source: Path | str | bytes) -> bytes:
    if isinstance(source, bytes):
        encoded = source
    else:
        try:
            encoded = Path(source).read_bytes()
        except OSError as error:
            raise BadImage(f"cannot be read ({error.strerror or error})") from error
    if not encoded:
        raise BadImage("is empty")
    end = {b"\xff\xd8": _JPEG_END, b"\x89P": _PNG_END}.get(encoded[:2], b"")
    if encoded.rfind(end) < 0:  # from the back: the end is near, but for trailers such as phones write
        raise BadImage("is cut off")
    return encoded


def _imdecode(encoded: bytes, reduction: int) -> NDArray[np.uint8]:
    """Pixels HW or HW3 (RGB) in file orientation; 16 bits scaled to 8, palettes looked up, alpha dropped."""
    # Without IMREAD_COLOR_RGB, which gives three planes to files without colour.
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION | _REDUCED[reduction]
    if is_tiff(encoded):
        tags = tags_of(encoded)
        if is_deep_grey(tags):
            return _deep_grey(encoded, flags, from_white=is_white_zero(tags))
        encoded = with_stored_colours(encoded, tags)
    pixels = _imdecode_as(encoded, flags)
    assert pixels.dtype == np.uint8
    if pixels.ndim == 3:
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return pixels


def _deep_grey(encoded: bytes, flags: int, *, from_white: bool) -> NDArray[np.uint8]:
    """Pixels HW of a TIFF whose 16 bits are scaled to 8 here, the upper half of each as everywhere."""
    pixels = _imdecode_as(encoded, flags | cv2.IMREAD_ANYDEPTH)
    if pixels.ndim != 2 or pixels.dtype != np.uint16:
        raise BadImage(UNDECODABLE)
    grey = (pixels >> 8).astype(np.uint8)
    return ~grey if from_white else grey


def _imdecode_as(encoded: bytes, flags: int) -> NDArray[Any]:
    try:
        pixels: NDArray[Any] | None = cv2.imdecode(np.frombuffer(encoded, dtype=np.uint8), flags)
    except cv2.error as error:
        raise BadImage(UNDECODABLE) from error
    if pixels is None:
        raise BadImage(UNDECODABLE)
    return pixels


def _turn(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Apply EXIF orientation 2..8: swap the axes for 5..8, then mirror."""
    assert 1 <= orientation <= 8
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def _average(pixels: NDArray[np.uint8], reduction: int) -> NDArray[np.uint8]:
    """Mean over blocks of `reduction` px, the last row and column repeated to fill the last blocks."""
    height, width = -(-pixels.shape[0] // reduction), -(-pixels.shape[1] // reduction)
    bottom, right = height * reduction - pixels.shape[0], width * reduction - pixels.shape[1]
    if bottom or right:
        pixels = cv2.copyMakeBorder(pixels, 0, bottom, 0, right, cv2.BORDER_REPLICATE)
    averaged: NDArray[np.uint8] = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return averaged
