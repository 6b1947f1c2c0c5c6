"""Accumulation: precision and recall of one class over its score threshold, from matches that come a part at a time.

The library keeps what it knows of every image of a class until the last one, some 1.5 kB per detection. What its
figures hang on is one byte per detection, range of areas and threshold of IoU: so images are matched by the library in
parts, and put together here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

_WRONG, _RIGHT, _PASSED_OVER = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class Matches:
    """What the library found of one class in N images with D detections, best first in each."""

    scores: NDArray[np.float64]
    """D."""
    ranks: NDArray[np.int32]
    """D, place of each among the detections of its image, from 0."""
    verdicts: NDArray[np.uint8]
    """ATD, of each range of areas and threshold of IoU: right, wrong, or passed over."""
    num_boxes: NDArray[np.int64]
    """A, true boxes that count."""

    @classmethod
    def of(cls, states: Iterable[tuple[Any, ...]], num_images: int, num_areas: int, num_thresholds: int) -> Matches:
        """Read the states of the library's evaluations, one by one.

        Those of the first range of areas come first, for all images, then those of the next.
        """
        scores: list[NDArray[np.float64]] = []
        pieces: list[list[NDArray[np.uint8]]] = [[] for _ in range(num_areas)]
        num_boxes = np.zeros(num_areas, np.int64)
        for number, (matches, _, found, ignored_boxes, ignored, *_) in enumerate(states):
            area = number // num_images
            num_boxes[area] += len(ignored_boxes) - sum(ignored_boxes)
            verdicts = np.where(np.array(matches, np.int64) > 0, _RIGHT, _WRONG).astype(np.uint8)
            verdicts[np.array(ignored, np.bool_)] = _PASSED_OVER
            pieces[area].append(verdicts.reshape(num_thresholds, len(found)))
            if area == 0:
                scores.append(np.array(found, np.float64))
        nothing = np.zeros((num_thresholds, 0), np.uint8)
        counts = np.array([len(each) for each in scores], np.int64)
        ends = np.cumsum(counts)
        return cls(
            scores=np.concatenate([np.zeros(0), *scores]),
            ranks=(np.arange(int(counts.sum())) - np.repeat(ends - counts, counts)).astype(np.int32),
            verdicts=np.stack([np.concatenate([nothing, *each], axis=1) for each in pieces]),
            num_boxes=num_boxes,
        )

    @classmethod
    def join(cls, parts: Sequence[Matches]) -> Matches:
        """Put the images of several parts after each other."""
        return cls(
            scores=np.concatenate([part.scores for part in parts]),
            ranks=np.concatenate([part.ranks for part in parts]),
            verdicts=np.concatenate([part.verdicts for part in parts], axis=2),
            num_boxes=np.sum([part.num_boxes for part in parts], axis=0),
        )


def accumulate(
    matches: Matches, recalls: NDArray[np.float64], most_detections: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return COCO's precision TRAM and recall TAM of a class; -1 where no true box counts.

    recalls: R, ascending, at which precision is read: the highest that any recall of at least this much has.
    most_detections: M numbers of detections of an image that count.
    """
    num_areas, num_thresholds, _ = matches.verdicts.shape
    precision = np.full((num_thresholds, len(recalls), num_areas, len(most_detections)), -1.0)
    recall = np.full((num_thresholds, num_areas, len(most_detections)), -1.0)
    order = np.argsort(-matches.scores, kind="stable")
    for m, most in enumerate(most_detections):
        chosen = order[matches.ranks[order] < most]
        for area, threshold in np.ndindex(num_areas, num_thresholds):
            count = int(matches.num_boxes[area])
            if not count:
                continue
            verdicts = matches.verdicts[area, threshold, chosen]
            right, wrong = np.cumsum(verdicts == _RIGHT), np.cumsum(verdicts == _WRONG)
            reached = right / count
            exact = right / np.maximum(right + wrong, 1)
            highest = np.maximum.accumulate(exact[::-1])[::-1]
            places = np.searchsorted(reached, recalls, side="left")
            there = places < len(highest)
            precision[threshold, there, area, m] = highest[places[there]]
            precision[threshold, ~there, area, m] = 0.0
            recall[threshold, area, m] = reached[-1] if len(reached) else 0.0
    return precision, recall
