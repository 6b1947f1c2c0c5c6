"""Render: pixels from transforms, every source pixel read once and every output pixel written once.

Two paths. Aligned: each tile is one resampling of whole source pixels into whole output pixels. Turned: each is one
`warpAffine`, or in perspective `warpPerspective`, into its bounds, kept where its own outline is. Sources that shrink a
lot are halved by averaging first. A second picture is painted into the rectangle that is cut for it, or as a layer of
its own that is then blended. Colour jitter and flips are the last pass,
from the picture into its place in the batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np

from paceline.data.tiles import map_points
from paceline.native.jitter import jitter
from paceline.native.picture import draw_pictures, kernels_for_pictures
from paceline.native.resample import resample, resample_by_area, resample_by_opencv

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.plain import Plain
    from paceline.letterbox import Letterbox

    Pixels = NDArray[np.uint8]

FILL = 114
"""Grey value of pixels that no image covers."""

FIRST_OF_SECOND = 4
"""Tiles before this one make the first picture."""
_IN_ORDER = (0, 1, 2)
_FRACTION_BITS = 8
_SHRINK_FOR_AREA = 1.6


class Workspace:
    """Buffers of one thread for pictures of `size` x `size`, allocated once."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.colour = np.empty((size, size, 3), np.uint8)
        self.layer = np.empty((size, size, 3), np.uint8)
        self.plane = np.empty((size, size), np.uint8)


def render(
    transforms: Transforms,
    rows: range,
    images: Sequence[Sequence[Pixels | None]],
    workspace: Workspace,
    out: Pixels,
    *,
    plain: Plain | None = None,
    masks: Callable[[int], Mapping[int, Pixels]] = lambda row: {},
) -> None:
    """Draw pictures `rows` into `out` (BHW3, RGB).

    `images` has the decoded image of each tile of each picture, HW3 or, without colour, HW; None where the tile has no
    source. `plain` is what `plain_of` says of the transforms: without it the compiled code for such pictures is not
    used. `masks` gives, by tile, the shares of each pixel of the decoded image that are pasted in a picture, HW. Where
    all images are without colour a picture is drawn in one plane.
    """
    drawn = _draw_plain(plain, rows, images, out)
    these = slice(rows.start, rows.stop)
    exchanged = (transforms.grey[these] | (transforms.swaps[these] != _IN_ORDER).any(axis=1)).tolist()
    for place, row in enumerate(rows):
        if not drawn[place]:
            seen = [tile for tile, source in enumerate(transforms.sources[row].tolist()) if source >= 0]
            picture = _painted(transforms, row, seen, images[place], workspace, masks)
            hue, saturation, value = transforms.hsv[row].tolist()
            mirror_x, mirror_y = transforms.flips[row].tolist() if transforms.aligned else (False, False)
            jitter(picture, (hue, saturation, value), out[place], mirror_x=mirror_x, mirror_y=mirror_y)
        if exchanged[place] and any(image is not None and image.ndim == 3 for image in images[place]):
            exchange_channels(out[place], bool(transforms.grey[row]), transforms.swaps[row].tolist(), workspace)


def _draw_plain(
    plain: Plain | None, rows: range, images: Sequence[Sequence[Pixels | None]], out: Pixels
) -> Sequence[bool]:
    """Draw those that are plain in one call, and say which these are."""
    kernels = kernels_for_pictures() if plain is not None else None
    if plain is None or kernels is None:
        return [False] * len(rows)
    these = slice(rows.start, rows.stop)
    chosen = plain.is_plain[these].tolist()
    return draw_pictures(
        kernels, plain.tiles[these], images, plain.hsv[these], plain.mirrors[these], out, chosen, fill=FILL
    )


def _painted(
    transforms: Transforms,
    row: int,
    seen: list[int],
    images: Sequence[Pixels | None],
    workspace: Workspace,
    masks_of: Callable[[int], Mapping[int, Pixels]],
) -> Pixels:
    """Paint a picture, before its colours change, in one plane where no image has colour."""
    masks = masks_of(row) if transforms.masked[row].any() else {}
    picture = workspace.colour if any(_image(images, tile).ndim == 3 for tile in seen) else workspace.plane
    share = float(transforms.shares[row])
    if share == 1:
        _paint(transforms, row, seen, images, picture, masks)
        return picture
    layers = transforms.layers[row].tolist()
    _paint(transforms, row, [tile for tile in seen if layers[tile] == 0], images, picture, masks)
    layer = workspace.layer.reshape(-1)[: picture.size].reshape(picture.shape)
    _paint(transforms, row, [tile for tile in seen if layers[tile] == 1], images, layer, masks)
    cv2.addWeighted(picture, share, layer, 1 - share, 0, dst=picture)
    return picture


def exchange_channels(out: Pixels, drain: bool, swap: list[int], workspace: Workspace) -> None:
    """Take the colour out of a picture HW3 (luma of ITU-R BT.601), or take its channels from others, in place."""
    if drain:
        cv2.cvtColor(out, cv2.COLOR_RGB2GRAY, dst=workspace.plane)
        cv2.cvtColor(workspace.plane, cv2.COLOR_GRAY2RGB, dst=out)
    else:
        np.copyto(workspace.colour, out)
        cv2.mixChannels([workspace.colour], [out], [swap[0], 0, swap[1], 1, swap[2], 2])


def letterbox(image: Pixels, box: Letterbox, out: Pixels) -> None:
    """Draw an image (HW3 RGB or HW), which covers exactly the box's image, letterboxed into `out` (HW3)."""
    rows, columns = slice(box.top, box.top + box.scaled_height), slice(box.left, box.left + box.scaled_width)
    if (box.scaled_height, box.scaled_width) != out.shape[:2]:
        out.fill(FILL)
    by_area = image.shape[1] / box.scaled_width > _SHRINK_FOR_AREA
    _resize_into(image, out[rows, columns], resample_by_area if by_area else resample_by_opencv)


def _image(images: Sequence[Pixels | None], tile: int) -> Pixels:
    image = images[tile]
    assert image is not None, "a visible tile needs its image"
    return image


def _paint(
    transforms: Transforms,
    row: int,
    tiles: list[int],
    images: Sequence[Pixels | None],
    picture: Pixels,
    masks: Mapping[int, Pixels],
) -> None:
    """Paint tiles over each other into a picture, which is grey where none is; flips of aligned ones come later."""
    places = transforms.places[row].tolist()
    covered = sum((places[tile][2] - places[tile][0]) * (places[tile][3] - places[tile][1]) for tile in tiles)
    cut = transforms.cuts[row].tolist()
    if not (transforms.aligned and covered == transforms.size**2) or cut[2] > 0 or transforms.masked[row].any():
        picture.fill(FILL)
    uncut = cut[2] == 0
    for tile in tiles:
        if not uncut and tile >= FIRST_OF_SECOND:
            _grey_out(transforms, row, cut, picture)
            uncut = True
        mask = None
        if transforms.masked[row, tile]:
            mask = masks.get(tile)
            if mask is None:
                continue
        if transforms.aligned:
            _draw_aligned(transforms, row, tile, _image(images, tile), picture, mask)
        else:
            _draw_turned(transforms, row, tile, _image(images, tile), picture, mask)
    if not uncut:
        _grey_out(transforms, row, cut, picture)


def _grey_out(transforms: Transforms, row: int, cut: list[int], picture: Pixels) -> None:
    left, top, right, bottom = _before_flips(transforms, row, cut)
    picture[top:bottom, left:right] = FILL


def _before_flips(transforms: Transforms, row: int, box: list[int]) -> tuple[int, int, int, int]:
    """Where a rectangle of the picture lies while it is painted: aligned pictures are flipped as a whole afterwards."""
    left, top, right, bottom = box
    mirrored_x, mirrored_y = transforms.flips[row].tolist() if transforms.aligned else (False, False)
    if mirrored_x:
        left, right = transforms.size - right, transforms.size - left
    if mirrored_y:
        top, bottom = transforms.size - bottom, transforms.size - top
    return left, top, right, bottom


def _draw_aligned(
    transforms: Transforms, row: int, tile: int, image: Pixels, picture: Pixels, mask: Pixels | None
) -> None:
    reduction = int(transforms.reductions[row, tile])
    halvings = int(transforms.halvings[row, tile])
    left, top, right, bottom = (int(edge) // reduction for edge in transforms.visible[row, tile].tolist())
    part = _halve(image[top:bottom, left:right], halvings)
    if mask is not None:
        mask = _halve(mask[top:bottom, left:right], halvings)
    left, top, right, bottom = place = _before_flips(transforms, row, transforms.places[row, tile].tolist())
    clip = _before_flips(transforms, row, transforms.clips[row, tile].tolist())
    if mask is None and clip[0] <= left and clip[1] <= top and clip[2] >= right and clip[3] >= bottom:
        _resize_into(part, picture[top:bottom, left:right], resample)
        return
    shape = (bottom - top, right - left)
    drawn = _resized(part, shape, resample)
    if mask is not None:
        mask = _resized(mask, shape, resample)
    _copy(drawn, mask, place, clip, picture, blend=mask is not None)


def _draw_turned(
    transforms: Transforms, row: int, tile: int, image: Pixels, picture: Pixels, mask: Pixels | None
) -> None:
    """Warp the seen part of the image, and keep of it what lies inside its own turned outline."""
    halvings = int(transforms.halvings[row, tile])
    unit = int(transforms.reductions[row, tile]) << halvings
    halved = 1 << halvings
    limit = np.array([image.shape[1], image.shape[0]]) // halved
    seen = transforms.visible[row, tile]
    low = np.clip(np.floor(seen[:2] / unit), 0, limit - 1).astype(int)
    high = np.clip(np.ceil(seen[2:] / unit), low + 1, limit).astype(int)
    (left, top), (right, bottom) = (low * halved).tolist(), (high * halved).tolist()
    part = _halve(image[top:bottom, left:right], halvings)
    if mask is not None:
        mask = _halve(mask[top:bottom, left:right], halvings)

    place = left, top, right, bottom = transforms.places[row, tile].tolist()
    shape = (right - left, bottom - top)
    matrix = transforms.matrices[row, tile]
    outline = map_points(matrix, np.array([seen[[0, 1]], seen[[2, 1]], seen[[2, 3]], seen[[0, 3]]])) - (left, top)
    # From pixel indices of the part to pixel indices of the picture: centres lie half a pixel inside their edges.
    (x, y), (to_x, to_y) = (low + 0.5) * unit, (left + 0.5, top + 0.5)
    to_picture = np.array([[1, 0, -to_x], [0, 1, -to_y], [0, 0, 1]]) @ matrix @ [[unit, 0, x], [0, unit, y], [0, 0, 1]]
    inside = np.zeros(shape[::-1], np.uint8)
    cv2.fillConvexPoly(
        inside, np.rint((outline - 0.5) * (1 << _FRACTION_BITS)).astype(np.int32), 255, shift=_FRACTION_BITS
    )
    if mask is not None:
        cv2.min(inside, _warp(mask, to_picture, shape), dst=inside)
    drawn, clip = _warp(part, to_picture, shape), tuple(transforms.clips[row, tile].tolist())
    _copy(drawn, inside, place, clip, picture, blend=mask is not None)


def _warp(part: Pixels, matrix: NDArray[np.float64], shape: tuple[int, int]) -> Pixels:
    """Resample by a projective map 33 of pixel indices; the plain affine warp where it is affine."""
    how, border = cv2.INTER_LINEAR, cv2.BORDER_REPLICATE
    if matrix[2, :2].any():
        warped: Pixels = cv2.warpPerspective(part, matrix, shape, flags=how, borderMode=border)
    else:
        warped = cv2.warpAffine(part, matrix[:2], shape, flags=how, borderMode=border)
    return warped


def _copy(
    drawn: Pixels,
    mask: Pixels | None,
    place: tuple[int, ...],
    clip: tuple[int, ...],
    picture: Pixels,
    *,
    blend: bool,
) -> None:
    """Copy a drawn tile to its place (xyxy), inside its clip; where its mask is set, or, to `blend`, by as much."""
    left, top = max(place[0], clip[0]), max(place[1], clip[1])
    right, bottom = min(place[2], clip[2]), min(place[3], clip[3])
    if right <= left or bottom <= top:
        return
    part = slice(top - place[1], bottom - place[1]), slice(left - place[0], right - place[0])
    below, drawn = picture[top:bottom, left:right], _like(drawn[part], picture)
    if mask is None:
        below[...] = drawn
    elif blend:
        _blend(drawn, mask[part], below)
    else:
        cv2.copyTo(drawn, mask[part], dst=below)


def _blend(drawn: Pixels, mask: Pixels, below: Pixels) -> None:
    """Paint over `below` with the opacity, 0 to 255, of a mask."""
    left, top, width, height = cv2.boundingRect(mask)
    if width:
        part = slice(top, top + height), slice(left, left + width)
        opacity = mask[part].astype(np.float32)
        opacity /= 255
        below[part] = cv2.blendLinear(drawn[part], below[part], opacity, 1 - opacity)


def _resize_into(part: Pixels, place: Pixels, way: Callable[[Pixels, Pixels], None]) -> None:
    """Resize into a view of the picture; colourless parts of a coloured picture get their planes here."""
    if part.shape[:2] == place.shape[:2]:
        np.copyto(place, _like(part, place))
    elif part.ndim == place.ndim:
        way(part, place)
    else:
        cv2.cvtColor(_resized(part, place.shape[:2], way), cv2.COLOR_GRAY2RGB, dst=place)


def _resized(part: Pixels, shape: tuple[int, ...], way: Callable[[Pixels, Pixels], None]) -> Pixels:
    """Resize to a height and width."""
    drawn = np.empty((*shape, *part.shape[2:]), np.uint8)
    way(part, drawn)
    return drawn


def _like(part: Pixels, picture: Pixels) -> Pixels:
    return part if part.ndim == picture.ndim else cv2.cvtColor(part, cv2.COLOR_GRAY2RGB)


def _halve(part: Pixels, times: int) -> Pixels:
    for _ in range(times):
        part = cv2.resize(part, (part.shape[1] // 2, part.shape[0] // 2), interpolation=cv2.INTER_AREA)
    return part
