from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paceline.boxes import anchor_points, decode_boxes
from paceline.errors import UserError
from paceline.evaluation import postprocess as postprocess_module
from paceline.evaluation.config import PostprocessConfig
from paceline.evaluation.postprocess import Detections, postprocess

SIZE = (64, 96)
NUM_POINTS = 8 * 12 + 4 * 6 + 2 * 3
NUM_CLASSES = 5


def random_outputs(seed: int, images: int = 3, *, bins: int = 16, shift: float = -2.0) -> tuple[Tensor, Tensor]:
    """Scores all differ by more than rounding, which depends on the place in the batch."""
    random = torch.Generator().manual_seed(seed)
    raw = torch.randn((images, NUM_POINTS, 4 * bins), generator=random)
    number = images * NUM_POINTS * NUM_CLASSES
    logits = torch.linspace(-3, 3, number)[torch.randperm(number, generator=random)] + shift
    return raw, logits.view(images, NUM_POINTS, NUM_CLASSES)


def reference(raw: Tensor, logits: Tensor, config: PostprocessConfig) -> list[tuple[list[float], float, int]]:
    """One image, pair by pair: the candidates in order, each kept unless a kept one of its class overlaps it."""
    points, strides = anchor_points(SIZE)
    boxes = decode_boxes(raw[None], points, strides)[0].tolist()
    scores = logits.sigmoid().tolist()
    pairs = [(point, label) for point in range(NUM_POINTS) for label in range(NUM_CLASSES)]
    pairs = [pair for pair in pairs if scores[pair[0]][pair[1]] >= config.conf]
    kept: list[tuple[int, int]] = []
    for point, label in sorted(pairs, key=lambda pair: -scores[pair[0]][pair[1]]):
        rivals = [other for other, rival in kept if rival == label or config.agnostic_nms]
        if all(overlap(boxes[other], boxes[point]) <= config.iou for other in rivals):
            kept.append((point, label))
    return [(boxes[point], scores[point][label], label) for point, label in kept[: config.max_det]]


def overlap(a: list[float], b: list[float]) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    both = width * height
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def rows(detections: Detections, image: int) -> list[tuple[list[float], float, int]]:
    count = int(detections.count[image])
    columns = (detections.boxes[image, :count], detections.scores[image, :count], detections.labels[image, :count])
    return list(zip(*(column.tolist() for column in columns), strict=True))


def assert_same(ours: list[tuple[list[float], float, int]], expected: list[tuple[list[float], float, int]]) -> None:
    """The same detections in the same order, their numbers equal up to rounding."""
    assert [label for _, _, label in ours] == [label for _, _, label in expected]
    assert [score for _, score, _ in ours] == pytest.approx([score for _, score, _ in expected], rel=1e-5)
    for (box, _, _), (expected_box, _, _) in zip(ours, expected, strict=True):
        assert box == pytest.approx(expected_box, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        PostprocessConfig(),
        PostprocessConfig(conf=0.3, iou=0.4, max_det=20),
        PostprocessConfig(conf=0.2, iou=0.5, agnostic_nms=True),
    ],
)
def test_equals_the_plain_reference(config: PostprocessConfig) -> None:
    raw, logits = random_outputs(0)
    detections = postprocess((raw, logits), SIZE, config)
    for image in range(3):
        expected = reference(raw[image], logits[image], config)
        assert_same(rows(detections, image), expected)


def test_a_point_gives_a_detection_for_each_class_above_the_threshold() -> None:
    raw, logits = random_outputs(1, images=1, shift=-20.0)
    logits[0, 40, [1, 3]] = torch.tensor([2.0, 1.0])
    detections = postprocess((raw, logits), SIZE, PostprocessConfig())
    assert detections.labels[0, :2].tolist() == [1, 3]
    assert int(detections.count[0]) == 2
    assert torch.equal(detections.boxes[0, 0], detections.boxes[0, 1])


def test_shapes_are_fixed_and_zero_beyond_the_count() -> None:
    detections = postprocess(random_outputs(2, shift=-5.0), SIZE, PostprocessConfig(conf=0.05))
    beyond = torch.arange(300) >= detections.count[:, None]
    assert detections.boxes.shape == (3, 300, 4)
    assert beyond.any()
    assert not detections.boxes[beyond].any()
    assert not detections.scores[beyond].any()
    assert not detections.labels[beyond].any()


@pytest.mark.parametrize("row", [0, 3, 19])
def test_a_score_that_is_the_threshold_is_kept(row: int) -> None:
    """So the best threshold of an evaluation, a score that occurs, keeps what its precision and recall count."""
    outputs = random_outputs(4, 1)
    score = float(postprocess(outputs, SIZE, PostprocessConfig(conf=0.01, max_det=20)).scores[0, row])
    kept = postprocess(outputs, SIZE, PostprocessConfig(conf=score))
    assert int(kept.count[0]) == row + 1
    assert float(kept.scores[0, row]) == score


def test_batched_equals_one_by_one() -> None:
    raw, logits = random_outputs(3)
    together = postprocess((raw, logits), SIZE, PostprocessConfig())
    for image in range(3):
        alone = postprocess((raw[image : image + 1], logits[image : image + 1]), SIZE, PostprocessConfig())
        assert_same(rows(alone, 0), rows(together, image))


def test_named_classes_are_those_of_all() -> None:
    outputs = random_outputs(4)
    everything = postprocess(outputs, SIZE, PostprocessConfig(max_det=1000))
    some = postprocess(outputs, SIZE, PostprocessConfig(max_det=1000), classes=(0, 3))
    for image in range(3):
        assert rows(some, image) == [row for row in rows(everything, image) if row[2] in (0, 3)]


@pytest.mark.parametrize("number", [-1, NUM_CLASSES])
def test_a_class_the_network_lacks_is_named(number: int) -> None:
    with pytest.raises(UserError, match=f"no class {number}"):
        postprocess(random_outputs(0), SIZE, PostprocessConfig(), classes=(number,))


@pytest.mark.parametrize("images", [0, 2])
def test_nothing_above_the_threshold_gives_nothing(images: int) -> None:
    detections = postprocess(random_outputs(5, images=images, shift=-30.0), SIZE, PostprocessConfig())
    assert detections.boxes.shape == (images, 300, 4)
    assert detections.count.tolist() == [0] * images


def test_numbers_that_are_not_finite_give_no_detection() -> None:
    raw, logits = random_outputs(6, images=2)
    raw[0], logits[1] = torch.nan, torch.nan
    detections = postprocess((raw, logits), SIZE, PostprocessConfig())
    assert detections.count.tolist() == [0, 0]


def test_mixed_precision_is_decoded_in_float32() -> None:
    raw, logits = (tensor.to(torch.bfloat16) for tensor in random_outputs(7))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = postprocess((raw, logits), SIZE, PostprocessConfig())
    full = postprocess((raw.float(), logits.float()), SIZE, PostprocessConfig())
    assert half.boxes.dtype == half.scores.dtype == torch.float32
    assert torch.equal(half.boxes, full.boxes)


def test_too_many_candidates_are_cut_to_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, logits = random_outputs(8)
    logits = (logits * 2).round() / 2  # many equal scores: of these the first pairs are taken
    monkeypatch.setattr(postprocess_module, "MAX_CANDIDATES", 100)
    detections = postprocess((raw, logits), SIZE, PostprocessConfig(iou=1.0))
    for image in range(3):
        scores = logits.sigmoid()[image].flatten()
        best = scores.sort(descending=True, stable=True).indices[:100]
        count = int(detections.count[image])
        assert count == 100
        assert torch.equal(detections.scores[image, :count], scores[best])
        assert torch.equal(detections.labels[image, :count], best % NUM_CLASSES)
