"""Pitch: how far apart the cells of a map lie whose channels are neighbours, be it whole or a slice; and layouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def pitch_of(values: Tensor) -> int | None:
    """Return how far apart the cells of a BCHW map lie, C or more where it is part of a wider one; None if unevenly."""
    _, channels, height, width = values.shape
    batch_stride, channel_stride, row_stride, cell_stride = values.stride()
    if width == 1:
        cell_stride = row_stride if height > 1 else batch_stride
    if height == 1:
        row_stride = width * cell_stride
    if len(values) == 1:
        batch_stride = height * row_stride
    even = row_stride == width * cell_stride and batch_stride == height * row_stride
    return cell_stride if even and (channel_stride == 1 or channels == 1) and cell_stride >= channels else None


def readable(values: Tensor) -> tuple[Tensor, int]:
    """Return a map, or a copy where its cells lie unevenly, and how far apart they lie."""
    pitch = pitch_of(values)
    if pitch is not None:
        return values, pitch
    return values.contiguous(memory_format=torch.channels_last), values.shape[1]


def by_eights(values: Tensor) -> tuple[Tensor, int]:
    """Return a map, or a copy where its cells lie unevenly or at odd distances, and how far apart they lie."""
    values, pitch = readable(values)
    if pitch % 8 == 0:
        return values, pitch
    return values.contiguous(memory_format=torch.channels_last), values.shape[1]


@dataclass(frozen=True)
class Layout:
    """Of a weight: what its gradient is like."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, weight: Tensor) -> Layout:
        """Return that of a weight, which itself need not be kept for its gradient."""
        return cls(weight.shape, weight.stride(), weight.dtype)
