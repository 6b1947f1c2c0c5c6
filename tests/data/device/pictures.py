"""Transforms of every kind, sources, and the ways to draw them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from paceline.data import augment
from paceline.data.config import AugmentConfig
from paceline.data.device.pack import Sources, packed
from paceline.data.device.reference import render_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor

    from paceline.data.augment import Transforms

    Pixels = NDArray[np.uint8]

SIZES = np.array([[120, 160], [200, 90], [64, 64], [333, 401], [500, 700]])
KINDS = {
    "aligned": AugmentConfig(flipud=0.5),
    "turned": AugmentConfig(flipud=0.5, degrees=40, shear=10),
}


def make_transforms(config: AugmentConfig, count: int, size: int, *, mosaic: bool = True, seed: int = 0) -> Transforms:
    """Draw transforms of `count` pictures over the sources of `SIZES`."""
    samples = np.arange(count) % len(SIZES)
    draws = augment.draw(seed, np.arange(count), samples)
    images = np.concatenate(
        [samples[:, None], augment.partners_of_all(augment.partner_draws(config, draws), len(SIZES))], axis=1
    )
    return augment.plan(config, size, draws, images, SIZES[images], np.ones_like(images), mosaic=mosaic)


def make_sources(*, grey: bool = False) -> list[Pixels]:
    """Waves that are smooth over a pixel, with a hard-edged rectangle; every second one without colour if `grey`."""
    images = []
    for number, (height, width) in enumerate(SIZES):
        y, x = np.mgrid[:height, :width] + 0.5
        waves = [128 + 100 * np.sin(x / 25 + shift + number) * np.cos(y / 35 + shift) for shift in range(3)]
        image = np.rint(np.stack(waves, -1)).astype(np.uint8)
        image[height // 3 : height // 2, width // 4 : width // 2] = (230, 40, 90)
        images.append(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if grey and number % 2 else image)
    return images


def targets_of(transforms: Transforms) -> dict[str, NDArray[np.generic]]:
    """Targets without a box."""
    count = len(transforms)
    return {
        "boxes": np.zeros((count, 4, 4), np.float32),
        "labels": np.zeros((count, 4), np.int64),
        "valid": np.zeros((count, 4), np.bool_),
        "samples": transforms.samples,
        "original_hw": np.ones((count, 2), np.int64),
    }


def images_of(transforms: Transforms, sources: list[Pixels]) -> list[list[Pixels | None]]:
    """Images of every tile."""
    return [[sources[number] if number >= 0 else None for number in row] for row in transforms.sources.tolist()]


def poisoned(count: int) -> Pixels:
    """Return a buffer that is larger than it has to be, full of what nobody should read."""
    return np.full(count + 1000, 213, np.uint8)


def draw(
    transforms: Transforms,
    sources: list[Pixels],
    render: Callable[..., Tensor] = render_reference,
    masks: dict[tuple[int, int], Pixels] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Tensor:
    """Pack and draw by the device's way."""
    batch = packed(transforms, Sources.of(images_of(transforms, sources)), targets_of(transforms), poisoned, masks)
    flat = torch.from_numpy(batch.buffer).to(device)
    table, _ = batch.opened(flat)
    return render(flat, flat, table, transforms.size, dtype)


def mixed(transforms: Transforms) -> Transforms:
    """Blend, cut, grey and swap: the second half of each picture's tiles joins another layer or a clip."""
    changed = replace(
        transforms,
        layers=transforms.layers.copy(),
        shares=transforms.shares.copy(),
        clips=transforms.clips.copy(),
        grey=np.arange(len(transforms)) % 5 == 1,
        swaps=transforms.swaps.copy(),
    )
    changed.layers[::2, 2:] = 1
    changed.shares[::2] = 0.35
    changed.clips[1::2, 2:] = (13, 9, transforms.size - 20, transforms.size - 5)
    changed.swaps[::3] = (2, 0, 1)
    return changed
