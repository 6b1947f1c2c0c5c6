import dataclasses

import pytest
import torch
from loss_reference import make_batch, plain_assignment, random_scene
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paceline.boxes import anchor_points, decode_boxes
from paceline.losses.assign import Scene, TaskAlignedAssigner


def scene_of(raw, scores, batch) -> Scene:
    points, strides = anchor_points(batch.size_hw, dtype=raw.dtype)
    return Scene(
        points=points,
        predicted_boxes=decode_boxes(raw, points, strides),
        logits=scores,
        boxes=batch.boxes.to(raw.dtype),
        labels=batch.labels,
        valid=batch.valid,
    )


def tuples(claims):
    return dataclasses.astuple(claims)


SCENES = {
    "few": {"counts": (3, 0, 1)},
    "dense": {"counts": (16, 9, 0, 16), "sides": (20.0, 60.0)},
    "tiny": {"counts": (12, 12), "sides": (0.5, 9.0)},
    "whole image": {"counts": (6, 2), "sides": (58.0, 64.0)},
    "one class": {"counts": (5, 4), "num_classes": 1},
    "many classes": {"counts": (8, 5), "num_classes": 40},
    "low": {"counts": (8, 5), "size_hw": (32, 160), "sides": (2.0, 32.0)},
}


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_the_plain_assignment(name, seed):
    scene = scene_of(*random_scene(seed, **SCENES[name]))
    ours = TaskAlignedAssigner()(scene)
    strides = anchor_points(SCENES[name].get("size_hw", (64, 96)))[1]
    points = [(x, y, s) for (x, y), s in zip(scene.points.tolist(), strides.tolist(), strict=True)]
    for image in range(len(scene.boxes)):
        valid = scene.valid[image]
        expected = plain_assignment(
            scene.predicted_boxes[image].tolist(),
            scene.logits[image].tolist(),
            points,
            scene.boxes[image][valid].tolist(),
            scene.labels[image][valid].tolist(),
            10,
        )
        scores = torch.zeros(len(points), dtype=torch.float64)
        owner = torch.zeros(len(points), dtype=torch.int64)
        for point, (ground_truth, score) in expected.items():
            scores[point], owner[point] = score, ground_truth
        torch.testing.assert_close(ours.target_score[image], scores, rtol=1e-9, atol=1e-12)
        assert torch.equal(ours.ground_truth[image], owner)


@pytest.mark.parametrize("name", SCENES)
def test_both_searches_and_any_pieces_find_the_same_claims(name):
    scene = scene_of(*random_scene(2, **SCENES[name]))
    whole = TaskAlignedAssigner()
    expected = tuples(whole.search_all_pairs(scene))
    pieces = TaskAlignedAssigner(max_pairs=1)
    for claims in (
        whole.search_inside_pairs(scene),
        pieces.search_all_pairs(scene),
        pieces.search_inside_pairs(scene),
        TaskAlignedAssigner(max_pairs=3000).search_all_pairs(scene),
        TaskAlignedAssigner(max_pairs=3000).search_inside_pairs(scene),
    ):
        for found, wanted in zip(tuples(claims), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Watches for the most elements that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf._base is None]
        self.elements = max([self.elements, *sizes])
        return result


@pytest.mark.parametrize("search", ["search_all_pairs", "search_inside_pairs"])
def test_a_thousand_boxes_are_assigned_in_bounded_memory(search):
    raw, scores, batch = random_scene(3, (1000, 400), size_hw=(160, 160), sides=(4.0, 80.0), num_padded=1000)
    scene = scene_of(raw.float(), scores.float(), batch)
    expected = tuples(TaskAlignedAssigner(max_pairs=2**30).search_inside_pairs(scene))
    with LargestTensor() as largest:
        claims = getattr(TaskAlignedAssigner(max_pairs=2**16), search)(scene)
    num_images, num_boxes, num_points = scene.shape
    assert largest.elements <= 2**16 < num_images * num_boxes * num_points / 15
    for found, wanted in zip(tuples(claims), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    owner, claimed = claims.settle()
    assert claimed[0].sum() > 300
    assert owner[0].unique().numel() > 50


def test_searching_all_pairs_never_asks_for_data():
    from torch._subclasses.fake_tensor import FakeTensorMode

    raw, scores, batch = random_scene(4, (5, 2))
    scene = scene_of(raw, scores, batch)
    mode = FakeTensorMode()
    fake = Scene(**{f.name: mode.from_tensor(getattr(scene, f.name)) for f in dataclasses.fields(Scene)})
    with mode:
        claims = TaskAlignedAssigner().search_all_pairs(fake)
        owner, _ = claims.settle()
    assert owner.shape == scene.predicted_boxes.shape[:2]


def one_prediction_scene(boxes, labels, predicted, logits):
    """One 32 x 32 image in which every point predicts the same box and scores."""
    points, _ = anchor_points((32, 32), dtype=torch.float64)
    batch = make_batch([torch.tensor(boxes)], [torch.tensor(labels)], (32, 32), len(boxes) + 1)
    return Scene(
        points=points,
        predicted_boxes=torch.tensor(predicted, dtype=torch.float64).expand(1, len(points), 4),
        logits=torch.tensor(logits, dtype=torch.float64).expand(1, len(points), len(logits)),
        boxes=batch.boxes.double(),
        labels=batch.labels,
        valid=batch.valid,
    )


def test_of_equal_boxes_the_first_gets_the_points():
    box = [4.5, 4.5, 27.5, 27.5]
    result = TaskAlignedAssigner(topk=21)(one_prediction_scene([box, box], [0, 1], [5.0, 5.0, 27.0, 27.0], [0.0, 3.0]))
    assert (result.target_score > 0).any()
    assert (result.ground_truth == 0).all()


def test_a_perfect_prediction_is_learnt_in_full():
    box = [4.5, 4.5, 27.5, 27.5]
    result = TaskAlignedAssigner()(one_prediction_scene([box], [0], box, [-5.0]))
    learning = result.target_score > 0
    assert learning.sum() == 9  # centres at 12 and 20 in level 8, at 8 and 24 in level 16, at 16 in level 32
    torch.testing.assert_close(result.target_score[learning], torch.ones(9, dtype=torch.float64), atol=1e-6, rtol=0)


def test_short_sides_are_widened_for_the_candidates_only():
    thin = [15.0, 15.5, 17.0, 16.5]  # no centre but that of level 32 is inside; widened to 16, four of level 8 are
    scene = one_prediction_scene([thin], [0], thin, [0.0])
    assert (TaskAlignedAssigner()(scene).target_score > 0.999).sum() == 5
    assert (TaskAlignedAssigner(least_side_px=0.0)(scene).target_score > 0.999).sum() == 1


def test_a_point_on_the_edge_is_outside():
    box = [4.0, 4.0, 28.0, 28.0]
    learning = TaskAlignedAssigner(topk=21)(one_prediction_scene([box], [0], box, [0.0])).target_score > 0
    assert learning.sum() == 4 + 4 + 1


def test_no_more_points_than_asked_for():
    box = [1.0, 1.0, 31.0, 31.0]
    scene = one_prediction_scene([box], [0], box, [0.0])
    assert [int((TaskAlignedAssigner(topk=k)(scene).target_score > 0).sum()) for k in (1, 7, 100)] == [1, 7, 21]


def test_a_prediction_without_overlap_claims_nothing():
    result = TaskAlignedAssigner()(one_prediction_scene([[1.0, 1.0, 20.0, 20.0]], [0], [90.0, 90.0, 99.0, 99.0], [0.0]))
    assert torch.equal(result.target_score, torch.zeros_like(result.target_score))
    assert torch.equal(result.ground_truth, torch.zeros_like(result.ground_truth))


def test_a_contested_point_may_go_to_a_box_that_did_not_claim_it():
    # Point 0 of level 8 is claimed by the two smaller boxes with topk=1; the third holds it, overlaps it more, and
    # claims another point, whose score is higher.
    boxes = [[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 21.0, 19.0], [0.0, 0.0, 24.0, 24.0]]
    scene = one_prediction_scene(boxes, [0, 0, 1], [0.0, 0.0, 24.0, 24.0], [0.0, -4.0])
    logits = scene.logits.clone()
    logits[0, 0, 0], logits[0, 5, 1] = 4.0, 4.0
    result = TaskAlignedAssigner(topk=1)(dataclasses.replace(scene, logits=logits))
    learning = result.target_score[0].nonzero()[:, 0].tolist()
    assert {point: int(result.ground_truth[0, point]) for point in learning} == {0: 2, 5: 2}
