"""Detection table: what a network found in many images, in pixels of the image files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class DetectionTable:
    """D detections, one row each: those of one image stand together, best first."""

    seen: NDArray[np.int64]
    """Images that were looked at, each once, those without detections included."""
    images: NDArray[np.int64]
    """D, row of the image in its index."""
    boxes: NDArray[np.float64]
    """D4, xyxy in pixels of the image file."""
    scores: NDArray[np.float64]
    """D, in [0, 1]."""
    labels: NDArray[np.int64]
    """D, class numbers from 0."""

    def __post_init__(self) -> None:
        assert len(np.unique(self.seen)) == len(self.seen), "an image was evaluated twice"
        assert len(self.images) == len(self.boxes) == len(self.scores) == len(self.labels)

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def concatenate(cls, tables: Iterable[Self]) -> Self:
        """Join the shares of batches or ranks, which must not have an image in common."""
        parts = list(tables)
        return cls(
            seen=np.concatenate([np.zeros(0, np.int64), *(part.seen for part in parts)]),
            images=np.concatenate([np.zeros(0, np.int64), *(part.images for part in parts)]),
            boxes=np.concatenate([np.zeros((0, 4)), *(part.boxes for part in parts)]),
            scores=np.concatenate([np.zeros(0), *(part.scores for part in parts)]),
            labels=np.concatenate([np.zeros(0, np.int64), *(part.labels for part in parts)]),
        )

    def rows(self, kept: NDArray[np.bool_] | NDArray[np.int64]) -> Self:
        """Keep some rows, named by a mask or by their numbers; the images seen stay the same."""
        return type(self)(
            seen=self.seen,
            images=self.images[kept],
            boxes=self.boxes[kept],
            scores=self.scores[kept],
            labels=self.labels[kept],
        )

    def of_image(self, image: int) -> Self:
        """Return the detections of one image, best first."""
        return self.rows(self.images == image)

    def sorted_by_image(self) -> Self:
        """Order by image, so that the result does not depend on the order of evaluation; within an image as it was."""
        order = np.argsort(self.images, kind="stable")
        return type(self)(
            seen=np.sort(self.seen),
            images=self.images[order],
            boxes=self.boxes[order],
            scores=self.scores[order],
            labels=self.labels[order],
        )

    def to_coco_json(
        self, image_ids: NDArray[np.int64], category_ids: NDArray[np.int64]
    ) -> list[dict[str, int | float | list[float]]]:
        """COCO's list of results: `image_id`, `category_id`, `bbox` (x, y, width, height in pixels) and `score`.

        `image_ids` are the ids of the index's rows, `category_ids` those of the classes.
        """
        columns = (
            image_ids[self.images].tolist(),
            category_ids[self.labels].tolist(),
            xywh(self.boxes).tolist(),
            self.scores.tolist(),
        )
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*columns, strict=True)
        ]


def xywh(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Turn corners xyxy N4 into COCO's x, y, width, height."""
    return np.concatenate((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), axis=1)
