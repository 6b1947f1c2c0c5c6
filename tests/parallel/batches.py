"""Random batches for the tests of engines."""

from __future__ import annotations

from dataclasses import fields

import torch

from paceline.batch import Batch

NUM_CLASSES = 3


def make_batch(images: int, *, boxes: int = 4, seed: int = 0, size: int = 64, empty: tuple[int, ...] = ()) -> Batch:
    """Random images with random boxes; the last one, and those of `empty`, have none."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(images, boxes, 2, generator=generator) * 40
    sides = 8 + torch.rand(images, boxes, 2, generator=generator) * 16
    valid = torch.ones(images, boxes, dtype=torch.bool)
    valid[-1] = False
    valid[list(empty)] = False
    return Batch(
        images=torch.randint(0, 256, (images, 3, size, size), generator=generator, dtype=torch.uint8),
        boxes=torch.cat([corner, corner + sides], dim=-1) * valid[..., None],
        labels=torch.randint(0, NUM_CLASSES, (images, boxes), generator=generator) * valid,
        valid=valid,
        samples=torch.arange(images),
        original_hw=torch.full((images, 2), size),
    )


def rows(batch: Batch, chosen: list[int] | slice) -> Batch:
    """Some images of a batch, as a batch."""
    return Batch(**{field.name: getattr(batch, field.name)[chosen] for field in fields(batch)})
