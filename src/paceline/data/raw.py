"""Raw images: decoded pixels as a file of the PNM family, whose bytes are the pixels.

    P6                                grey images: P5
    # paceline reduction 2            source pixels per pixel, along each axis; blanks fill the header to 64 bytes
    320 240                           width, height
    255
    pixels                            uint8, rows from the top, RGB or grey; upright

The comment is what tells ours from other files of the family, which are not read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from paceline.data.headers import BadImage

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_BYTES = 64
_HEADER = re.compile(rb"P([56])\n# paceline reduction (\d+) *\n(\d+) (\d+)\n255\n")
_STARTS = (b"P5\n# paceline", b"P6\n# paceline")


def is_raw(content: bytes) -> bool:
    """Tell whether the bytes of an image are a raw one of ours."""
    return content.startswith(_STARTS)


def to_raw(pixels: NDArray[np.uint8], reduction: int = 1) -> bytes:
    """Write pixels HW or HW3 (RGB), each of which stands for `reduction` source pixels along each axis."""
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 2 or pixels.shape[2] == 3
    height, width = pixels.shape[:2]
    start = f"P{5 if pixels.ndim == 2 else 6}\n# paceline reduction {reduction}"
    end = f"\n{width} {height}\n255\n"
    assert len(start) + len(end) <= HEADER_BYTES
    return (start.ljust(HEADER_BYTES - len(end)) + end).encode() + np.ascontiguousarray(pixels).tobytes()


def from_raw(content: bytes) -> tuple[NDArray[np.uint8], int]:
    """Return pixels HW or HW3 (RGB; a view of `content`, not to be written to) and their reduction.

    Raises BadImage where the content is not whole.
    """
    found = _HEADER.fullmatch(content[:HEADER_BYTES])
    if not found:
        raise BadImage("has a damaged header; make the pack anew")
    kind, reduction, width, height = (int(text) for text in found.groups())
    shape = (height, width) if kind == 5 else (height, width, 3)
    if len(content) - HEADER_BYTES != int(np.prod(shape)):
        raise BadImage("has fewer pixels than it says; make the pack anew")
    return np.frombuffer(content, np.uint8, offset=HEADER_BYTES).reshape(shape), reduction
