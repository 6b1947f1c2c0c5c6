"""Targets: the ground truth of a batch, gathered from the index and padded to a size from a short list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from paceline.data import paste
from paceline.data.augment import enough, place_boxes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from paceline.data.augment import Transforms
    from paceline.data.index import Index
    from paceline.data.paste import Outline

MOST_COVERED = 0.5
"""Share of a box that pasted objects may cover; boxes that they cover further are no targets any more."""
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
    there = transforms.sources >= 0
    pastes = transforms.masked & there
    pictures, tiles = np.nonzero(there & ~transforms.masked)
    rows, owners = boxes_of(index, transforms.sources[pictures, tiles])
    pictures, tiles = pictures[owners], tiles[owners]
    boxes, kept = place_boxes(transforms, pictures, tiles, index.boxes[rows])
    if not pastes.any():
        return pictures[kept], boxes[kept], index.labels[rows[kept]]
    pasted = [
        (int(picture), paste.outlines(index, transforms, picture, tile))
        for picture, tile in zip(*np.nonzero(pastes), strict=True)
    ]
    first = transforms.layers[pictures, tiles] == 0  # what is blended in lies above
    for picture, objects in pasted:
        below = np.flatnonzero((pictures == picture) & first & kept)
        rings = [ring for _, own in objects for ring in own]
        if len(below) and rings:
            kept[below] = paste.covered(transforms.size, rings, boxes[below]) <= MOST_COVERED
    return _with_pasted(index, transforms.size, pasted, pictures[kept], boxes[kept], index.labels[rows[kept]])


def _with_pasted(
    index: Index,
    size: int,
    pasted: Sequence[tuple[int, Sequence[Outline]]],
    pictures: NDArray[np.int64],
    boxes: NDArray[np.float64],
    labels: NDArray[np.int32],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]:
    """Add the bounds of the objects that are pasted into pictures to targets M, each behind those of its picture."""
    added = [(picture, row, rings) for picture, objects in pasted for row, rings in objects]
    if not added:
        return pictures, boxes, labels
    frame = np.array([0.0, 0.0, size, size])
    whole = np.array([_bounds(rings) for _, _, rings in added])
    seen = np.array([_bounds([paste.cut_ring(ring, frame) for ring in rings]) for _, _, rings in added])
    kept = enough(seen, np.prod(whole[:, 2:] - whole[:, :2], axis=1))
    pictures = np.concatenate([pictures, np.array([picture for picture, _, _ in added])[kept]])
    boxes = np.concatenate([boxes, seen[kept]])
    labels = np.concatenate([labels, index.labels[np.array([row for _, row, _ in added])[kept]]])
    order = np.argsort(pictures, kind="stable")
    return pictures[order], boxes[order], labels[order]


def _bounds(rings: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Bounds 4 (xyxy) of the points of rings; zeros where there is none."""
    points = np.concatenate(rings)
    return np.concatenate([points.min(axis=0), points.max(axis=0)]) if len(points) else np.zeros(4)


def joined(
    pictures: Sequence[tuple[NDArray[np.float64], NDArray[np.int32]]],
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int32]]:
    """Put the targets (boxes N4, labels N) of pictures after each other: picture M, box M4, label M."""
    return (
        np.repeat(np.arange(len(pictures)), [len(labels) for _, labels in pictures]),
        np.concatenate([boxes for boxes, _ in pictures]),
        np.concatenate([labels for _, labels in pictures]),
    )


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
