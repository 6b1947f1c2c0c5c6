"""A batch of noise: random pixels and random boxes, where no data set is named."""

from __future__ import annotations

import torch

from paceline.batch import Batch

BOXES = 16
"""Per image, about what a mosaic of COCO shows; padded to `PADDED`, as the loader would."""
PADDED = 32


def noise_batch(images: int, imgsz: int, num_classes: int, *, dtype: torch.dtype | None, device: torch.device) -> Batch:
    """Make a batch on the device, the same for equal arguments.

    dtype: of images in [0, 1], as a device draws them; None for uint8, as the host does.
    """
    generator = torch.Generator().manual_seed(0)
    sides = imgsz * (0.05 + 0.35 * torch.rand(images, BOXES, 2, generator=generator))
    corners = (imgsz - sides) * torch.rand(images, BOXES, 2, generator=generator)
    boxes = torch.zeros(images, PADDED, 4)
    boxes[:, :BOXES] = torch.cat((corners, corners + sides), dim=-1)
    labels = torch.zeros(images, PADDED, dtype=torch.int64)
    labels[:, :BOXES] = torch.randint(0, num_classes, (images, BOXES), generator=generator)
    pixels = torch.randint(0, 256, (images, 3, imgsz, imgsz), generator=generator, dtype=torch.uint8)
    pixels = pixels.to(device, memory_format=torch.channels_last)
    return Batch(
        images=pixels if dtype is None else pixels.to(dtype).div_(255.0),
        boxes=boxes,
        labels=labels,
        valid=(torch.arange(PADDED) < BOXES).expand(images, PADDED).clone(),
        samples=torch.arange(images),
        original_hw=torch.full((images, 2), imgsz),
    ).to(device)
