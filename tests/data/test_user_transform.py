"""The user's own function: what it is given, what may come back, and that threads do not change its numbers."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import pytest
import torch

from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.index import Index, Strings
from paceline.data.loader import TrainLoader
from paceline.data.user_transform import UserTransform
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from paceline.batch import Batch

    Pixels = NDArray[np.uint8]
    Boxes = NDArray[np.float64]
    Labels = NDArray[np.int64]

IMAGE = np.zeros((40, 60, 3), np.uint8)
BOXES, LABELS = np.array([[1.0, 2, 30, 20], [5, 5, 9, 9]]), np.array([1, 0], np.int32)


def mirrored(image: Pixels, boxes: Boxes, labels: Labels) -> tuple[Pixels, Boxes, Labels]:
    width = image.shape[1]
    return image[:, ::-1], np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1), labels


def noisy(image: Pixels, boxes: Boxes, labels: Labels) -> tuple[Pixels, Boxes, Labels]:
    """From the global generators; it also changes what it is given."""
    image[:] = np.random.randint(0, 255)
    boxes += random.random()
    return image, boxes, labels


def noisy_by_generator(
    image: Pixels, boxes: Boxes, labels: Labels, rng: np.random.Generator
) -> tuple[Pixels, Boxes, Labels]:
    return np.full_like(image, rng.integers(0, 255)), boxes + rng.random(), labels


class Compose:
    """Has the signature of Albumentations' pipelines: keywords in, a dict out, generators of its own."""

    def __init__(self, form: str = "pascal_voc", fields: tuple[str, ...] = ("classes",)) -> None:
        self.processors = {"bboxes": SimpleNamespace(params=SimpleNamespace(format=form, label_fields=list(fields)))}
        self.generator = np.random.default_rng(0)

    def set_random_seed(self, seed: int) -> None:
        self.generator = np.random.default_rng(seed)

    def __call__(self, *, image: Pixels, bboxes: Boxes, classes: list[int]) -> dict[str, Any]:
        value = self.generator.integers(0, 255)
        return {
            "image": np.full_like(image, value),
            "bboxes": bboxes[:1],
            "classes": [float(classes[0])][: len(bboxes)],
        }


def test_a_function_sees_what_it_needs_and_its_answer_is_taken() -> None:
    image, boxes, labels = UserTransform(mirrored)(IMAGE, BOXES, LABELS, 0)
    assert image.shape == IMAGE.shape
    np.testing.assert_array_equal(boxes, [[30, 2, 59, 20], [51, 5, 55, 9]])
    assert labels.tolist() == [1, 0]


def test_boxes_are_cut_to_the_picture_and_those_outside_go() -> None:
    def moved(image: Pixels, boxes: Boxes, labels: Labels) -> tuple[Pixels, Boxes, Labels]:
        return image, np.array([[-5, -5, 70, 10], [60, 0, 80, 10], [3, 3, 3, 9]]), np.array([1, 1, 0])

    _, boxes, labels = UserTransform(moved)(IMAGE, BOXES, LABELS, 0)
    assert boxes.tolist() == [[0, 0, 60, 10]]
    assert labels.tolist() == [1]


@pytest.mark.parametrize("none", [(np.zeros((0, 4)), []), ([], [])])
def test_a_picture_may_lose_all_boxes(none: tuple[Any, Any]) -> None:
    _, boxes, labels = UserTransform(lambda image, *_: (image, *none))(IMAGE, BOXES, LABELS, 0)
    assert boxes.shape == (0, 4)
    assert labels.shape == (0,)


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (None, "returned a NoneType; return a tuple"),
        ((IMAGE, BOXES), "returned a tuple of 2"),
        ((IMAGE[:20], BOXES, LABELS), r"returned an image of \(20, 60, 3\) uint8; return one of \(40, 60, 3\)"),
        ((IMAGE / 255, BOXES, LABELS), "float64"),
        ((IMAGE, BOXES * np.nan, LABELS), "NaN"),
        ((IMAGE, BOXES[:, ::-1], LABELS), "ends before it starts"),
        ((IMAGE, BOXES[:1], LABELS), "1 boxes and 2 labels"),
        ((IMAGE, BOXES, LABELS + 0.5), "no class number"),
        ((IMAGE, BOXES, LABELS - 1), "no class number"),
        ((IMAGE, "boxes", LABELS), "no numbers"),
        ((IMAGE, BOXES[:, :3], LABELS), "no numbers"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_sentence(answer: object, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        UserTransform(lambda *_: answer)(IMAGE, BOXES, LABELS, 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pipeline", [Compose("coco"), Compose(fields=()), 3])
def test_unusable_transforms_are_refused_at_once(pipeline: Any) -> None:
    with pytest.raises(UserError, match=r"pascal_voc|give a function"):
        UserTransform(pipeline)


def test_global_generators_are_left_as_they_were() -> None:
    random.seed(5)
    np.random.seed(5)
    expected = random.random(), np.random.random()
    random.seed(5)
    np.random.seed(5)
    UserTransform(noisy)(IMAGE, BOXES, LABELS, 7)
    assert (random.random(), np.random.random()) == expected
    assert not IMAGE.any()


def index_in(folder: Path) -> Index:
    """Ten images of noise with two boxes each."""
    noise = np.random.default_rng(0)
    for number in range(10):
        cv2.imwrite(str(folder / f"{number}.png"), noise.integers(0, 256, (90, 120, 3), np.uint8))
    return Index(
        names=("thing", "other"),
        root=folder,
        paths=Strings.of(f"{number}.png" for number in range(10)),
        sizes=np.full((10, 2), (90, 120), np.int32),
        orientation=np.ones(10, np.uint8),
        offsets=np.arange(0, 21, 2),
        boxes=np.tile([[10.0, 10, 60, 50], [30, 20, 110, 85]], (10, 1)),
        labels=np.tile([0, 1], 10).astype(np.int32),
        crowd=np.zeros(20, bool),
        difficult=np.zeros(20, bool),
        area=np.ones(20),
        image_ids=np.arange(10),
        category_ids=np.arange(2),
        origins=np.arange(10),
    )


def same(ours: Batch, theirs: Batch) -> bool:
    names = ("images", "boxes", "labels", "valid", "samples")
    return all(torch.equal(getattr(ours, name), getattr(theirs, name)) for name in names)


def batches(folder: Path, transform: Callable[..., Any], workers: int) -> list[Batch]:
    config = DataConfig(imgsz=96, batch=4, workers=workers)
    with TrainLoader(index_in(folder), config, AugmentConfig(), 3, transform=UserTransform(transform)) as loader:
        return [batch for epoch in range(2) for batch in loader.epoch(epoch, mosaic=True)]


@pytest.mark.parametrize("transform", [noisy, noisy_by_generator, Compose()], ids=["global", "generator", "pipeline"])
def test_threads_change_no_number(tmp_path: Path, transform: Callable[..., Any]) -> None:
    one = batches(tmp_path, transform, 1)
    three = batches(tmp_path, transform, 3)
    assert all(same(*pair) for pair in zip(one, three, strict=True))
    values = {int(picture[0, 0, 0]) for batch in one for picture in batch.images}
    assert len(values) > 10


def test_pictures_of_the_loader_are_those_that_the_function_makes(tmp_path: Path) -> None:
    """Mirrored by the function, every batch is the mirror image of what it is without."""
    plain = batches(tmp_path, lambda *given: given, 2)
    turned = batches(tmp_path, mirrored, 2)
    for batch, mirror in zip(plain, turned, strict=True):
        assert torch.equal(batch.images.flip(-1), mirror.images)
        boxes = batch.boxes[batch.valid]
        expected = torch.stack([96 - boxes[:, 2], boxes[:, 1], 96 - boxes[:, 0], boxes[:, 3]], 1)
        torch.testing.assert_close(mirror.boxes[mirror.valid], expected)
        assert torch.equal(mirror.labels, batch.labels)


def test_a_function_that_fails_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="return a tuple"):
        batches(tmp_path, lambda *_: None, 2)


def test_albumentations_work_as_they_are(tmp_path: Path) -> None:
    albumentations = pytest.importorskip("albumentations")
    pipeline = albumentations.Compose(
        [albumentations.HorizontalFlip(p=0.5), albumentations.RandomBrightnessContrast(p=1.0)],
        bbox_params=albumentations.BboxParams(format="pascal_voc", label_fields=["labels"]),
    )
    one, three = batches(tmp_path, pipeline, 1), batches(tmp_path, pipeline, 3)
    assert all(same(*pair) for pair in zip(one, three, strict=True))
    plain = batches(tmp_path, lambda *given: given, 2)
    flips = 0
    for batch, changed in zip(plain, one, strict=True):
        for row in range(4):
            before, after = batch.boxes[row][batch.valid[row]], changed.boxes[row][changed.valid[row]]
            flipped = torch.stack([96 - before[:, 2], before[:, 1], 96 - before[:, 0], before[:, 3]], 1)
            same_place = torch.allclose(before, after, atol=1e-3)
            assert same_place or torch.allclose(flipped, after, atol=1e-3)
            flips += not same_place
    assert 0 < flips < 4 * len(plain)
