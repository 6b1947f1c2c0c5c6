"""Ground truth: what evaluation has to know of a data set, as one table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """The M true boxes of N images; those of image i are the rows `offsets[i]` to `offsets[i + 1]`."""

    num_images: int
    num_classes: int
    offsets: NDArray[np.int64]
    """N + 1, from 0 to M."""
    boxes: NDArray[np.float64]
    """M4, xyxy in pixels of the image file."""
    labels: NDArray[np.int32]
    """M, class numbers from 0."""
    crowd: NDArray[np.bool_]
    """M, regions of many objects: detections inside count neither way, however many there are (COCO's rule)."""
    difficult: NDArray[np.bool_]
    """M, single objects that need not be found: a detection of one counts neither way (VOC's rule)."""
    area: NDArray[np.float64]
    """M, in square pixels, as COCO's size ranges want it: the segment's where there is one, else the box's."""
    sizes: NDArray[np.int32]
    """N2, height and width of the image files in pixels."""

    def __post_init__(self) -> None:
        assert len(self.offsets) == self.num_images + 1
        assert len(self.sizes) == self.num_images
        num_boxes = int(self.offsets[-1])
        for column in (self.boxes, self.labels, self.crowd, self.difficult, self.area):
            assert len(column) == num_boxes, (len(column), num_boxes)

    @cached_property
    def images(self) -> NDArray[np.int64]:
        """M, the image of each box."""
        return np.repeat(np.arange(self.num_images), np.diff(self.offsets))

    @cached_property
    def counts(self) -> NDArray[np.bool_]:
        """M, True for the boxes that a detector has to find: neither crowd nor difficult."""
        return ~(self.crowd | self.difficult)

    @cached_property
    def num_boxes_of_class(self) -> NDArray[np.int64]:
        """K, number of boxes to be found of each class."""
        return np.bincount(self.labels[self.counts], minlength=self.num_classes)

    @cached_property
    def num_images_of_class(self) -> NDArray[np.int64]:
        """K, number of images with a box to be found of each class."""
        keys = np.unique(self.images[self.counts] * self.num_classes + self.labels[self.counts])
        return np.bincount(keys % self.num_classes, minlength=self.num_classes)
