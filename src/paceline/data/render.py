"""Render: pixels from transforms, every source pixel read once and every output pixel written once.

Two paths. Aligned: each tile is one `resize` of whole source pixels into whole output pixels. Turned: each tile is one
`warpAffine` into its bounds, kept where its own outline is. Sources that shrink a lot are halved by averaging first.
Colour jitter and flips are the last pass, from the picture into its place in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from paceline.native.jitter import jitter

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.letterbox import Letterbox

    Pixels = NDArray[np.uint8]

FILL = 114
"""Grey value of pixels that no image covers."""

_FRACTION_BITS = 8
_SHRINK_FOR_AREA = 1.6


class Workspace:
    """Buffers of one thread for pictures of `size` x `size`, allocated once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = np.empty((size, size, 3), np.uint8)
        self.plane = np.empty((size, size), np.uint8)


def render(
    transforms: Transforms, row: int, images: Sequence[Pixels | None], workspace: Workspace, out: Pixels
) -> None:
    """Draw picture `row` into `out` (HW3, RGB).

    `images` has the decoded image of each tile, HW3 or, without colour, HW; None where the tile has no source.
    Where all are without colour the picture is drawn in one plane.
    """
    seen = [tile for tile, source in enumerate(transforms.sources[row].tolist()) if source >= 0]
    grey = all(_image(images, tile).ndim == 2 for tile in seen)
    picture = workspace.plane if grey else workspace.colour
    places = transforms.places[row].tolist()
    covered = sum((places[tile][2] - places[tile][0]) * (places[tile][3] - places[tile][1]) for tile in seen)
    if not (transforms.aligned and covered == transforms.size**2):
        picture.fill(FILL)
    for tile in seen:
        if transforms.aligned:
            _draw_aligned(transforms, row, tile, _image(images, tile), picture)
        else:
            _draw_turned(transforms, row, tile, _image(images, tile), picture)
    mirror_x, mirror_y = (transforms.flips[row] & transforms.aligned).tolist()
    shift, saturation, value = transforms.hsv[row].tolist()
    jitter(picture, (shift, saturation, value), out, mirror_x=mirror_x, mirror_y=mirror_y)


def letterbox(image: Pixels, box: Letterbox, out: Pixels) -> None:
    """Draw an image (HW3 RGB or HW), which covers exactly the box's image, letterboxed into `out` (HW3)."""
    rows, columns = slice(box.top, box.top + box.scaled_height), slice(box.left, box.left + box.scaled_width)
    if (box.scaled_height, box.scaled_width) != out.shape[:2]:
        out.fill(FILL)
    shrink = image.shape[1] / box.scaled_width
    how = cv2.INTER_AREA if shrink > _SHRINK_FOR_AREA else cv2.INTER_LINEAR
    _resize_into(image, out[rows, columns], how)


def _image(images: Sequence[Pixels | None], tile: int) -> Pixels:
    image = images[tile]
    assert image is not None, "a visible tile needs its image"
    return image


def _draw_aligned(transforms: Transforms, row: int, tile: int, image: Pixels, picture: Pixels) -> None:
    reduction = int(transforms.reductions[row, tile])
    left, top, right, bottom = (int(edge) // reduction for edge in transforms.visible[row, tile].tolist())
    part = _halve(image[top:bottom, left:right], int(transforms.halvings[row, tile]))
    left, top, right, bottom = transforms.places[row, tile].tolist()
    mirrored_x, mirrored_y = transforms.flips[row].tolist()  # the whole picture is flipped after it is drawn
    if mirrored_x:
        left, right = transforms.size - right, transforms.size - left
    if mirrored_y:
        top, bottom = transforms.size - bottom, transforms.size - top
    _resize_into(part, picture[top:bottom, left:right], cv2.INTER_LINEAR)


def _draw_turned(transforms: Transforms, row: int, tile: int, image: Pixels, picture: Pixels) -> None:
    """Warp the seen part of the image, and keep of it what lies inside its own turned outline."""
    unit = int(transforms.reductions[row, tile] << transforms.halvings[row, tile])
    halved = 1 << int(transforms.halvings[row, tile])
    limit = np.array([image.shape[1], image.shape[0]]) // halved
    seen = transforms.visible[row, tile]
    low = np.clip(np.floor(seen[:2] / unit), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(seen[2:] / unit), low + 1, limit).astype(int)
    (left, top), (right, bottom) = (low * halved).tolist(), (high * halved).tolist()
    part = _halve(image[top:bottom, left:right], int(transforms.halvings[row, tile]))

    left, top, right, bottom = transforms.places[row, tile].tolist()
    linear, offset = transforms.matrices[row, tile, :2, :2], transforms.matrices[row, tile, :2, 2]
    corners = np.array([seen[[0, 1]], seen[[2, 1]], seen[[2, 3]], seen[[0, 3]]]) @ linear.T + offset - (left, top)
    # From pixel indices of the part to pixel indices of the picture: centres lie half a pixel inside their edges.
    to_picture = np.empty((2, 3))
    to_picture[:, :2] = linear * unit
    to_picture[:, 2] = linear @ ((low + 0.5) * unit) + offset - (left, top) - 0.5
    shape = (right - left, bottom - top)
    warped = cv2.warpAffine(part, to_picture, shape, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    outline = np.rint((corners - 0.5) * (1 << _FRACTION_BITS)).astype(np.int32)
    mask = cv2.fillConvexPoly(np.zeros(shape[::-1], np.uint8), outline, 255, shift=_FRACTION_BITS)
    cv2.copyTo(_like(warped, picture), mask, dst=picture[top:bottom, left:right])


def _resize_into(part: Pixels, place: Pixels, how: int) -> None:
    """Resize into a view of the picture; colourless parts of a coloured picture get their planes here."""
    shape = (place.shape[1], place.shape[0])
    if part.shape[:2] == place.shape[:2]:
        np.copyto(place, _like(part, place))
    elif part.ndim == place.ndim:
        drawn = cv2.resize(part, shape, dst=place, interpolation=how)
        assert drawn is place or np.shares_memory(drawn, place)
    else:
        cv2.cvtColor(cv2.resize(part, shape, interpolation=how), cv2.COLOR_GRAY2RGB, dst=place)


def _like(part: Pixels, picture: Pixels) -> Pixels:
    return part if part.ndim == picture.ndim else cv2.cvtColor(part, cv2.COLOR_GRAY2RGB)


def _halve(part: Pixels, times: int) -> Pixels:
    for _ in range(times):
        part = cv2.resize(part, (part.shape[1] // 2, part.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return part
