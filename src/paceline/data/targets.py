"""Targets: the ground truth of a batch, gathered from the index and padded to a size from a short list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline.data.augment import place_boxes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.index import Index

_BUCKETS = (32, 64, 128, 300)


def bucket(num_boxes: int) -> int:
    """Return the size that holds `num_boxes`: 32, 64, 128, 300, then doubling without end.

    Few sizes mean few shapes to compile and allocate for; no upper end means that no box is ever left out.
    """
    size = next((size for size in _BUCKETS if size >= num_boxes), _BUCKETS[-1])
    while size < num_boxes:
        size *= 2
    return size


def boxes_of(index: Index, images: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows M of the index' targets (boxes neither crowd nor difficult) that lie in `images` N, and which of N each."""
    counts = index.offsets[images + 1] - index.offsets[images]
    owners = np.repeat(np.arange(len(images)), counts)
    ahead = np.cumsum(counts) - counts
    rows = np.arange(len(owners)) + (index.offsets[images] - ahead)[owners]
    kept = ~(index.crowd[rows] | index.difficult[rows])
    return rows[kept], owners[kept]


def transformed(
    index: Index, transforms: Transforms
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]:
    """Targets that pictures of `transforms` show: picture M, box M4 (xyxy, output pixels), label M."""
    pictures, tiles = np.nonzero(transforms.sources >= 0)
    rows, owners = boxes_of(index, transforms.sources[pictures, tiles])
    boxes, kept = place_boxes(transforms, pictures[owners], tiles[owners], index.boxes[rows])
    return pictures[owners][kept], boxes[kept], index.labels[rows][kept]


def padded(
    pictures: NDArray[np.int64], boxes: NDArray[np.float64], labels: NDArray[np.int32], num_pictures: int
) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.bool_]]:
    """Targets M, sorted by picture, as boxes BG4, labels BG and valid BG."""
    counts = np.bincount(pictures, minlength=num_pictures)
    slots = np.arange(len(pictures)) - (np.cumsum(counts) - counts)[pictures]
    size = bucket(int(counts.max(initial=0)))
    boxes_BG4 = np.zeros((num_pictures, size, 4), np.float32)
    labels_BG = np.zeros((num_pictures, size), np.int64)
    valid_BG = np.zeros((num_pictures, size), np.bool_)
    boxes_BG4[pictures, slots] = boxes
    labels_BG[pictures, slots] = labels
    valid_BG[pictures, slots] = True
    return boxes_BG4, labels_BG, valid_BG
