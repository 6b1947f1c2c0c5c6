"""Reference: the pictures of a batch from its table in plain PyTorch, tile by tile; slow, and easy to check.

The law that the kernel keeps too: the centre of output pixel (x, y) is (x + 0.5, y + 0.5); a tile is sampled bilinearly
between the centres of its blocks, the outermost of which reach on to its edge; tiles are painted in their order, over
grey; the layers are mixed; hue, saturation and value change by their definition; then greyscale, then the swap. All of
it is float32 and rounded once, at the end, to the output's type: the host rounds to whole steps in between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from paceline.data.device.table import PictureInt, TileFloat, TileInt
from paceline.data.render import FILL

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.data.device.pack import DeviceTable

LUMA = (0.299, 0.587, 0.114)


def render_reference(sources: Tensor, masks: Tensor, table: DeviceTable, size: int, dtype: torch.dtype) -> Tensor:
    """Draw B3HW in [0, 1], channels-last, from uint8 buffers of sources and masks."""
    num_pictures, num_tiles = table.starts.shape
    out = torch.empty((num_pictures, size, size, 3), dtype=dtype, device=sources.device)
    for picture in range(num_pictures):
        integers = table.pictures_int[picture].tolist()
        layers = torch.full((2, size, size, 3), float(FILL), device=sources.device)
        for tile in range(num_tiles):
            _paint(sources, masks, table, picture, tile, integers[PictureInt.CUT :], layers)
        hue, saturation, value, share = table.pictures_float[picture].tolist()
        mixed = torch.lerp(layers[1], layers[0], share)
        coloured = jittered(mixed, hue, saturation, value)
        if integers[PictureInt.GREY]:
            coloured = (coloured @ coloured.new_tensor(LUMA))[..., None].expand(-1, -1, 3)
        out[picture] = coloured[..., integers[PictureInt.SWAP : PictureInt.SWAP + 3]] / 255
    return out.permute(0, 3, 1, 2)


def jittered(pixels: Tensor, hue: float, saturation: float, value: float) -> Tensor:
    """Shift the hue (in sixths of a turn) of RGB pixels ...3 in [0, 255], scale saturation and value."""
    red, green, blue = pixels.unbind(-1)
    most = pixels.amax(-1)
    spread = most - pixels.amin(-1)
    safe = spread.clamp_min(1e-6)
    sixths = torch.where(
        most == red,
        (green - blue) / safe,
        torch.where(most == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    strength = (spread / most.clamp_min(1e-6) * saturation).clamp_max(1)
    bright = (most * value).clamp_max(255)
    place = torch.stack([sixths + (hue + shift) for shift in (5, 3, 1)], dim=-1)
    place = place - 6 * torch.floor(place / 6)
    ramp = torch.minimum(place, 4 - place).clamp(0, 1)
    return bright[..., None] - (bright * strength)[..., None] * ramp


def _paint(
    sources: Tensor, masks: Tensor, table: DeviceTable, picture: int, tile: int, cut: list[int], layers: Tensor
) -> None:
    """Paint one tile into its layer, in place."""
    integers = table.tiles_int[picture, tile].tolist()
    left, top, right, bottom = integers[:4]
    if right <= left or bottom <= top:
        return
    floats = table.tiles_float[picture, tile]
    y, x = torch.meshgrid(
        torch.arange(top, bottom, device=sources.device),
        torch.arange(left, right, device=sources.device),
        indexing="ij",
    )
    centres = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], dim=-1).float()
    mapped = centres @ floats[:9].view(3, 3).T
    u, v = mapped[..., 0] / mapped[..., 2], mapped[..., 1] / mapped[..., 2]
    seen = floats[TileFloat.SEEN :]
    inside = (mapped[..., 2] > 0) & (u >= seen[0]) & (u < seen[2]) & (v >= seen[1]) & (v < seen[3])
    if integers[TileInt.YIELDS]:
        inside &= ~((x >= cut[0]) & (x < cut[2]) & (y >= cut[1]) & (y < cut[3]))
    pixels = _sampled(
        sources, int(table.starts[picture, tile]), integers, integers[TileInt.PITCH], planes=None, uv=(u, v)
    )
    opacity = inside[..., None].float()
    mask_start = int(table.mask_starts[picture, tile])
    if mask_start >= 0:
        opacity = (
            opacity * _sampled(masks, mask_start, integers, integers[TileInt.MASK_PITCH], planes=1, uv=(u, v)) / 255
        )
    below = layers[integers[TileInt.LAYER], top:bottom, left:right]
    below.copy_(torch.where(opacity > 0, below + opacity * (pixels - below), below))


def _sampled(
    buffer: Tensor, start: int, integers: list[int], pitch: int, *, planes: int | None, uv: tuple[Tensor, Tensor]
) -> Tensor:
    """Bilinear values ...3 or ...1 of a crop at places (u, v) in blocks."""
    height, width, halvings = integers[TileInt.HEIGHT], integers[TileInt.WIDTH], integers[TileInt.HALVINGS]
    planes = planes or integers[TileInt.PLANES]
    shape = (height << halvings, width << halvings, planes)
    crop = buffer.as_strided(shape, (pitch, planes, 1), buffer.storage_offset() + start).float()
    if halvings:
        crop = F.avg_pool2d(crop.permute(2, 0, 1), 1 << halvings).permute(1, 2, 0)
    near, weights = [], []
    for place, extent in ((uv[0], width), (uv[1], height)):
        place = torch.nan_to_num(place, 0.0, 0.0, 0.0).clamp(-1, extent + 1) - 0.5
        first = torch.floor(place)
        weights.append((place - first)[..., None])
        near.append([(first + step).long().clamp(0, extent - 1) for step in (0, 1)])
    (x0, x1), (y0, y1) = near
    above = torch.lerp(crop[y0, x0], crop[y0, x1], weights[0])
    below = torch.lerp(crop[y1, x0], crop[y1, x1], weights[0])
    return torch.lerp(above, below, weights[1])
