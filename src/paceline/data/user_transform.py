"""User transform: a function of the user's own, applied to each training picture after everything else.

It takes `(image, boxes, labels)`, uint8 HW3 RGB, float N4 xyxy in pixels, int N, and returns the same three. An
Albumentations pipeline with `bbox_params` is taken as it is.

Random numbers are seeded for each picture from (seed, pass, sample), so threads and restarts change nothing: a function
with an argument `rng` is given a `numpy.random.Generator`; a pipeline is seeded by its own `set_random_seed`, on a copy
for each thread; for any other function the global generators of `random` and `numpy` are seeded around the call, one
call at a time.
"""

from __future__ import annotations

import copy
import inspect
import random
import threading
from typing import TYPE_CHECKING, Any

import numpy as np

from paceline.data.draws import keys
from paceline.data.slots import Slot
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Annotated = tuple[NDArray[np.uint8], NDArray[np.float64], NDArray[np.int64]]

_global_generators = threading.Lock()


class UserTransform:
    """A callable of the user, with its seeds set and its results checked.

    Raises UserError for a pipeline whose `bbox_params` are missing or are not `pascal_voc`, and, when it is called, for
    results that are no picture of the same size with boxes.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        if _is_pipeline(function):
            self._call: Callable[..., Any] = _Pipeline(function)
        elif not callable(function):
            raise UserError(f"transform is {function!r}; give a function of (image, boxes, labels), or a pipeline.")
        elif _takes_generator(function):
            self._call = _with_generator(function)
        else:
            self._call = _with_global_generators(function)

    def change(
        self, picture: NDArray[np.uint8], boxes: NDArray[np.float64], labels: NDArray[np.int32], seed: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Apply it to a picture in place, and return what it makes of the boxes and labels."""
        changed, boxes, more = self(picture, boxes, labels, seed)
        np.copyto(picture, changed)
        return boxes, more.astype(np.int32)

    def __call__(
        self, image: NDArray[np.uint8], boxes: NDArray[np.float64], labels: NDArray[np.int32], seed: int
    ) -> Annotated:
        """Apply it to a picture HW3, boxes N4 and labels N; its results are checked and its boxes cut to the picture.

        It is given copies, so it may change them in place. Raises UserError where the result cannot be used.
        """
        result = self._call(image.copy(), boxes.astype(np.float32), labels.astype(np.int64), seed)
        if not isinstance(result, tuple) or len(result) != 3:
            raise UserError(f"{self.name} returned {_described(result)}; return a tuple (image, boxes, labels).")
        changed = np.asarray(result[0])
        if changed.shape != image.shape or changed.dtype != np.uint8:
            raise UserError(
                f"{self.name} returned an image of {changed.shape} {changed.dtype}; return one of {image.shape} uint8, "
                "as it was given."
            )
        return changed, *self._checked(result[1], result[2], image.shape[:2])

    def _checked(
        self, boxes: object, labels: object, shape: tuple[int, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Boxes as N4 and labels as N, without those of which nothing is in the picture."""
        try:
            boxes_N4 = np.asarray(boxes, np.float64).reshape(-1, 4)
            labels_N = np.asarray(labels, np.float64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise UserError(f"{self.name} returned boxes or labels that are no numbers ({error}).") from error
        if len(boxes_N4) != len(labels_N):
            raise UserError(
                f"{self.name} returned {len(boxes_N4)} boxes and {len(labels_N)} labels; return a label for each box."
            )
        if not (np.isfinite(boxes_N4).all() and np.isfinite(labels_N).all()):
            raise UserError(f"{self.name} returned a box or label that is NaN or infinite; return numbers.")
        if (labels_N < 0).any() or (labels_N % 1 != 0).any():
            raise UserError(f"{self.name} returned a label that is no class number; return those it was given.")
        if (boxes_N4[:, 2:] < boxes_N4[:, :2]).any():
            raise UserError(
                f"{self.name} returned a box that ends before it starts; return (left, top, right, bottom)."
            )
        height, width = shape
        boxes_N4 = np.clip(boxes_N4, 0, (width, height, width, height))
        kept = (boxes_N4[:, 2:] > boxes_N4[:, :2]).all(axis=1)
        return boxes_N4[kept], labels_N[kept].astype(np.int64)


def seeds(draws: NDArray[np.float64]) -> NDArray[np.uint64]:
    """Seeds B of pictures by their random numbers BS."""
    return keys(draws[:, Slot.HOOK]) >> np.uint64(21)


class _Pipeline:
    """Albumentations' `Compose`, or what has its signature: keywords in, a dict out."""

    def __init__(self, compose: Any) -> None:
        boxes = compose.processors.get("bboxes")
        fields = list(boxes.params.label_fields or ()) if boxes else []
        if not fields or boxes.params.format != "pascal_voc":
            raise UserError(
                "transform needs boxes in pixels and their labels; give it "
                "bbox_params=BboxParams(format='pascal_voc', label_fields=['labels'])."
            )
        self._compose, self._field = compose, str(fields[0])
        self._others = [str(field) for field in fields[1:]]
        self._local = threading.local()

    def __call__(
        self, image: NDArray[np.uint8], boxes: NDArray[np.float32], labels: NDArray[np.int64], seed: int
    ) -> tuple[Any, ...]:
        mine = self._local.__dict__.get("compose")
        if mine is None:  # it holds generators, which threads must not share
            mine = self._local.compose = copy.deepcopy(self._compose)
        mine.set_random_seed(seed)
        fields = {self._field: labels.tolist()} | {name: labels.tolist() for name in self._others}
        result = mine(image=image, bboxes=boxes, **fields)
        return result["image"], result["bboxes"], result[self._field]


def _is_pipeline(function: object) -> bool:
    return callable(function) and hasattr(function, "set_random_seed") and hasattr(function, "processors")


def _takes_generator(function: Callable[..., Any]) -> bool:
    try:
        return "rng" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, and silent about itself
        return False


def _with_generator(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(image: object, boxes: object, labels: object, seed: int) -> Any:
        return function(image, boxes, labels, rng=np.random.default_rng(seed))

    return call


def _with_global_generators(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(image: object, boxes: object, labels: object, seed: int) -> Any:
        with _global_generators:
            before = random.getstate(), np.random.get_state()
            random.seed(seed)
            np.random.seed(seed % (1 << 32))
            try:
                return function(image, boxes, labels)
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])

    return call


def _described(result: object) -> str:
    return f"a tuple of {len(result)}" if isinstance(result, tuple) else f"a {type(result).__name__}"
