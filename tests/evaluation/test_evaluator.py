from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from paceline.batch import Batch
from paceline.boxes import anchor_points
from paceline.evaluation.config import PostprocessConfig
from paceline.evaluation.evaluator import Evaluator, evaluate, locate
from paceline.evaluation.ground_truth import GroundTruth
from paceline.evaluation.table import DetectionTable
from paceline.letterbox import Letterbox
from paceline.records import to_jsonable

CANVAS = (96, 160)
NAMES = ("disc", "square", "star")
SIZES = np.array([[300, 400], [77, 33], [96, 160], [1080, 1920], [50, 51]], dtype=np.int32)


def make_truth() -> GroundTruth:
    """Five images of different shapes: two boxes in each, but none in the third."""
    per_image = [2, 2, 0, 2, 2]
    offsets = np.concatenate(([0], np.cumsum(per_image)))
    images = np.repeat(np.arange(5), per_image)
    share = np.tile([[0.1, 0.1, 0.4, 0.6], [0.5, 0.3, 0.95, 1.0]], (4, 1))
    boxes = share * np.tile(SIZES[images][:, ::-1], 2)
    return GroundTruth(
        num_images=5,
        num_classes=3,
        offsets=offsets,
        boxes=boxes,
        labels=np.array([0, 1, 1, 1, 0, 1, 0, 0], dtype=np.int32),
        crowd=np.zeros(8, dtype=np.bool_),
        difficult=np.zeros(8, dtype=np.bool_),
        area=np.prod(boxes[:, 2:] - boxes[:, :2], axis=1),
        sizes=SIZES,
    )


def make_batch(samples: list[int]) -> Batch:
    size = len(samples)
    shapes = [SIZES[sample].tolist() if sample >= 0 else [1, 1] for sample in samples]
    return Batch(
        images=torch.zeros((size, 3, *CANVAS), dtype=torch.uint8),
        boxes=torch.zeros((size, 1, 4)),
        labels=torch.zeros((size, 1), dtype=torch.int64),
        valid=torch.zeros((size, 1), dtype=torch.bool),
        samples=torch.tensor(samples),
        original_hw=torch.tensor(shapes),
    )


def perfect_outputs(truth: GroundTruth, samples: list[int]) -> tuple[Tensor, Tensor]:
    """Raw outputs (one bin: the distances themselves) of a network that sees each box at a point inside it."""
    points, strides = anchor_points(CANVAS)
    raw = torch.ones((len(samples), len(points), 4))
    logits = torch.full((len(samples), len(points), len(NAMES)), -20.0)
    for place, sample in enumerate(samples):
        rows = range(*truth.offsets[sample : sample + 2]) if sample >= 0 else [0]
        letterbox = Letterbox.fit(*SIZES[sample].tolist(), *CANVAS)
        for row in rows:
            box = torch.from_numpy(letterbox.forward(truth.boxes[row : row + 1])[0])
            point = int((points - (box[:2] + box[2:]) / 2).square().sum(dim=1).argmin())
            sides = torch.cat((points[point] - box[:2], box[2:] - points[point]))
            raw[place, point] = sides / strides[point]
            logits[place, point, truth.labels[row]] = 3.0 + place / 10
    return raw, logits


def run(truth: GroundTruth, batches: list[list[int]]) -> Evaluator:
    evaluator = Evaluator(PostprocessConfig(), truth, NAMES)
    for samples in batches:
        evaluator.add(make_batch(samples), perfect_outputs(truth, samples))
    return evaluator


def test_a_perfect_network_gets_full_marks() -> None:
    truth = make_truth()
    evaluation = run(truth, [[0, 1, 2], [3, 4, -1]]).finish()
    record = evaluation.record
    assert (record.ap, record.ap50, record.ap75, record.ar100) == pytest.approx((1, 1, 1, 1))
    assert (record.precision, record.recall, record.f1) == (1, 1, 1)
    assert (record.num_images, record.num_boxes) == (5, 8)
    assert [(entry.name, entry.num_boxes, entry.num_images, entry.ap) for entry in record.per_class] == [
        ("disc", 4, 3, pytest.approx(1)),
        ("square", 4, 3, pytest.approx(1)),
        ("star", 0, 0, -1),
    ]
    assert evaluation.confusion.counts.tolist() == np.diag([4, 4, 0, 0]).tolist()
    assert (evaluation.ap, evaluation.ap50, evaluation.ap75) == (record.ap, record.ap50, record.ap75)
    assert repr(evaluation) == (
        "<Evaluation AP 1.000, AP50 1.000, P 1.000, R 1.000 on 5 images with 8 boxes>"  # neither curves nor boxes
    )


def test_boxes_come_back_in_the_pixels_of_the_image_files() -> None:
    truth = make_truth()
    detections = run(truth, [[4, 2, 0], [-1, 3, 1]]).finish().detections
    assert np.array_equal(np.unique(detections.images), [0, 1, 3, 4])
    for image in (0, 1, 3, 4):
        found = detections.of_image(image).boxes
        expected = truth.boxes[truth.images == image]
        pixel = max(SIZES[image] / CANVAS)  # one pixel of the network's input, in the image's
        assert np.allclose(found[np.argsort(found[:, 0])], expected, rtol=0, atol=1e-4 * max(pixel, 1))


def test_boxes_map_back_by_the_letterbox_exactly() -> None:
    evaluator = Evaluator(PostprocessConfig(conf=0.2, max_det=50), make_truth(), NAMES)
    random = torch.Generator().manual_seed(0)
    points = len(anchor_points(CANVAS)[0])
    batch = make_batch([3, -1, 1])
    outputs = (torch.randn((3, points, 64), generator=random), torch.randn((3, points, 3), generator=random))
    detections = evaluator.add(batch, outputs)
    table = locate(detections, batch)
    assert table.seen.tolist() == [3, 1]
    for place, sample in ((0, 3), (2, 1)):
        count = int(detections.count[place])
        boxes = detections.boxes[place, :count].numpy().astype(np.float64)
        expected = Letterbox.fit(*SIZES[sample].tolist(), *CANVAS).inverse(boxes)
        assert np.array_equal(table.of_image(sample).boxes, expected)
        assert np.array_equal(table.of_image(sample).scores, detections.scores[place, :count].numpy())


def test_neither_order_nor_batches_nor_ranks_change_the_figures() -> None:
    """Random outputs, scores well apart: their last bit depends on the place in the batch."""
    truth = make_truth()
    random = torch.Generator().manual_seed(1)
    points = len(anchor_points(CANVAS)[0])
    raw = torch.randn((6, points, 4), generator=random) + 2
    logits = torch.linspace(-3, 3, 6 * points * 3)[torch.randperm(6 * points * 3, generator=random)].view(6, points, 3)

    def shared_out(batches: list[list[int]]) -> Evaluator:
        evaluator = Evaluator(PostprocessConfig(), truth, NAMES)
        for samples in batches:
            evaluator.add(make_batch(samples), (raw[samples], logits[samples]))
        return evaluator

    expected = shared_out([[0, 1, 2], [3, 4, -1]]).finish()
    ranks = [shared_out([[1, 4]]), shared_out([[3, -1], [2, 0]])]
    joined = evaluate(truth, DetectionTable.concatenate([rank.detections for rank in ranks]), NAMES)
    assert 0 < expected.record.ap50 < 1
    assert joined.record.threshold == pytest.approx(expected.record.threshold, abs=1e-6)
    assert replace(joined.record, threshold=0.0) == replace(expected.record, threshold=0.0)
    assert np.array_equal(joined.detections.boxes, expected.detections.boxes)


def test_an_image_added_twice_is_refused() -> None:
    truth = make_truth()
    evaluator = run(truth, [[0, 1]])
    with pytest.raises(AssertionError, match="twice"):
        evaluator.add(make_batch([2, 1]), perfect_outputs(truth, [2, 1]))


def test_a_missing_image_is_refused() -> None:
    with pytest.raises(AssertionError, match="2 images were never evaluated"):
        run(make_truth(), [[0, 1, 4]]).finish()


def test_the_record_can_be_written() -> None:
    record = run(make_truth(), [[0, 1, 2, 3, 4]]).finish().record
    assert json.loads(json.dumps(to_jsonable(record), allow_nan=False))["per_class"][0]["name"] == "disc"
