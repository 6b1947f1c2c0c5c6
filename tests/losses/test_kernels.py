"""The loss by kernels, which Triton's interpreter runs, against the loss by PyTorch's operations."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from loss_reference import make_batch, random_scene

from paceline.boxes import anchor_points, decode_boxes
from paceline.losses.assign import Scene, TaskAlignedAssigner
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

    from paceline.batch import Batch

SCENES: dict[str, dict[str, Any]] = {
    "few": {"counts": (3, 0, 1)},
    "a slot per claim": {"counts": (3, 0, 5), "num_padded": 5},
    "dense": {"counts": (16, 0, 9), "sides": (20.0, 60.0)},
    "dense, a slot per claim": {"counts": (16, 14), "sides": (20.0, 150.0), "size_hw": (160, 160)},
    "tiny": {"counts": (12, 12), "sides": (0.5, 9.0)},
    "whole image": {"counts": (6, 2), "sides": (58.0, 64.0)},
    "one class": {"counts": (5, 4), "num_classes": 1},
    "many classes": {"counts": (8, 5), "num_classes": 80},
    "many points": {"counts": (4, 2), "num_padded": 4, "sides": (30.0, 300.0), "size_hw": (320, 320)},
    "one image, one box": {"counts": (1,), "num_padded": 1},
    "no boxes": {"counts": (0, 0), "num_padded": 4},
}
"""B images of 126, 525 or 2100 points: no multiple of any block."""
PARTS = ("box", "cls", "dfl", "normaliser")


def outputs(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Batch]:
    raw, scores, batch = random_scene(seed, **SCENES[name])
    return raw.to(dtype), scores.to(dtype), batch


def plain_scene(raw: Tensor, scores: Tensor, batch: Batch) -> Scene:
    points, strides = anchor_points(batch.size_hw)
    return Scene(
        points=points,
        predicted_boxes=decode_boxes(raw.float(), points, strides),
        logits=scores.float(),
        boxes=batch.boxes,
        labels=batch.labels,
        valid=batch.valid,
    )


def assigned(kernels: ModuleType, raw: Tensor, scores: Tensor, batch: Batch, **settings: Any) -> Any:
    points, strides = anchor_points(batch.size_hw)
    grid = kernels.Grid(points=points, strides=strides, size_hw=batch.size_hw, finest=8, num_levels=3)
    options = {"topk": 10, "least_side_px": 16.0} | settings
    return kernels.assign(raw, scores, grid, batch, **options)


def assert_same_targets(targets: Any, scene: Scene, topk: int = 10) -> None:
    """Compare boxes and slots with what the search over all pairs finds."""
    expected = TaskAlignedAssigner(topk=topk, fixed_shapes=True)(scene)
    owner, claimed = TaskAlignedAssigner(topk=topk).search_all_pairs(scene).settle()
    torch.testing.assert_close(targets.predicted, scene.predicted_boxes, rtol=1e-6, atol=1e-4)
    for image, (points, owners, weights) in enumerate(
        zip(targets.slot_point, targets.slot_owner, targets.slot_weight, strict=True)
    ):
        counts = points >= 0
        assert torch.equal(counts, owners >= 0)
        assert not weights[~counts].any()
        order = points[counts].argsort()
        assert torch.equal(points[counts][order], claimed[image].nonzero()[:, 0].int()), "each claimed point, once"
        assert torch.equal(owners[counts][order], owner[image][claimed[image]].int())
        torch.testing.assert_close(
            weights[counts][order], expected.target_score[image][claimed[image]], rtol=2e-5, atol=1e-9
        )


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float32) for name in SCENES), ("dense", torch.bfloat16)])
def test_the_kernels_assign_as_the_search_over_all_pairs(
    name: str, dtype: torch.dtype, interpreted: ModuleType
) -> None:
    raw, scores, batch = outputs(name, dtype)
    scene = plain_scene(raw, scores, batch)
    targets = assigned(interpreted, raw, scores, batch)
    assert_same_targets(targets, scene)
    per_point = batch.labels.shape[1] * 10 >= len(scene.points)
    assert targets.slot_point.shape[1] == (len(scene.points) if per_point else batch.labels.shape[1] * 10)


@pytest.mark.parametrize(("pieces", "many", "lanes"), [(1, 8192, 1024), (2, 8192, 16), (4, 8192, 32), (4, 1, 64)])
def test_the_points_of_a_box_may_be_looked_at_in_any_pieces(
    pieces: int, many: int, lanes: int, interpreted: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, scores, batch = outputs("many points", torch.float32)
    whole = assigned(interpreted, raw, scores, batch)
    monkeypatch.setattr(interpreted, "_PIECES", pieces)
    monkeypatch.setattr(interpreted, "_MANY_BOXES", many)
    monkeypatch.setattr(interpreted, "_CLAIMED", {"block": lanes})
    in_pieces = assigned(interpreted, raw, scores, batch)
    for field in dataclasses.fields(whole):
        assert torch.equal(getattr(in_pieces, field.name), getattr(whole, field.name)), field.name


@pytest.mark.parametrize("topk", [1, 7, 40])
def test_no_more_points_than_asked_for(topk: int, interpreted: ModuleType) -> None:
    raw, scores, batch = outputs("whole image", torch.float32)
    targets = assigned(interpreted, raw, scores, batch, topk=topk)
    assert_same_targets(targets, plain_scene(raw, scores, batch), topk)
    assert 1 <= (targets.slot_weight > 0).sum(dim=1).max() <= 6 * topk


def raw_of(boxes: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Raw outputs 1A64 that decode to the boxes A4, as far as a point can reach their sides."""
    points, strides = anchor_points(size_hw)
    sides = torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), dim=-1) / strides.unsqueeze(-1)
    tent = (1 - (torch.arange(16) - sides.clamp(0, 15).unsqueeze(-1)).abs()).clamp(min=1e-12)
    return tent.log().flatten(1).unsqueeze(0)


def test_a_contested_point_may_go_to_a_box_that_did_not_claim_it(interpreted: ModuleType) -> None:
    # As in test_assign: the two smaller boxes claim point 0, the third holds it, overlaps it more, and claims point 5.
    boxes = [[0.0, 0.0, 20.0, 20.0], [0.0, 0.0, 21.0, 19.0], [0.0, 0.0, 24.0, 24.0]]
    batch = make_batch([torch.tensor(boxes)], [torch.tensor([0, 0, 1])], (32, 32), 4)
    raw = raw_of(torch.tensor([0.0, 0.0, 24.0, 24.0]).expand(21, 4), (32, 32))
    scores = torch.tensor([0.0, -4.0]).repeat(1, 21, 1)
    scores[0, 0, 0], scores[0, 5, 1] = 4.0, 4.0
    targets = assigned(interpreted, raw, scores, batch, topk=1)
    assert_same_targets(targets, plain_scene(raw, scores, batch), topk=1)
    found = {int(point): int(owner) for point, owner in zip(targets.slot_point[0], targets.slot_owner[0], strict=True)}
    assert found == {-1: -1, 0: 2, 5: 2}


def test_of_equal_boxes_the_first_gets_the_points(interpreted: ModuleType) -> None:
    box = [4.5, 4.5, 27.5, 27.5]
    batch = make_batch([torch.tensor([box, box])], [torch.tensor([0, 1])], (32, 32), 2)
    raw = raw_of(torch.tensor([5.0, 5.0, 27.0, 27.0]).expand(21, 4), (32, 32))
    targets = assigned(interpreted, raw, torch.zeros(1, 21, 2), batch, topk=3)
    assert targets.slot_owner[0][targets.slot_point[0] >= 0].tolist() == [0, 0, 0]


def test_of_equal_points_the_first_are_claimed(interpreted: ModuleType) -> None:
    batch = make_batch([torch.tensor([[8.0, 8.0, 24.0, 24.0]])], [torch.tensor([0])], (32, 32), 1)
    raw = torch.full((1, 21, 4, 16), -300.0)
    raw[..., 1] = 0.0  # a stride to each side: points 5, 6, 9 and 10 lie alike in the box
    targets = assigned(interpreted, raw.flatten(2), torch.zeros(1, 21, 1), batch, topk=3)
    assert targets.slot_point[0].tolist() == [5, 6, 9]
    assert targets.slot_weight[0].unique().numel() == 1


def sums_and_gradients(raw: Tensor, scores: Tensor, batch: Batch, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Parts of the loss, and the gradients of its undivided total, times a scale."""
    raw, scores = raw.detach().requires_grad_(), scores.detach().requires_grad_()
    sums = DetectionLoss(LossConfig(), scores.shape[-1], fixed_shapes=True)((raw, scores), batch)
    assert not sums.normaliser.requires_grad
    assert all(getattr(sums, part).shape == () and getattr(sums, part).dtype == torch.float32 for part in PARTS)
    gradients = torch.autograd.grad(sums.total * scale, (raw, scores))
    return torch.stack([getattr(sums, part).detach() for part in PARTS]), *gradients


def both_ways(
    raw: Tensor, scores: Tensor, batch: Batch, monkeypatch: pytest.MonkeyPatch, scale: float = 1.0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """By kernels and by PyTorch's operations."""
    found = sums_and_gradients(raw, scores, batch, scale)
    with monkeypatch.context() as patch:
        patch.setattr("paceline.losses.detection.usable", lambda device: False)
        return found, sums_and_gradients(raw, scores, batch, scale)


ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""One rounding of a gradient in its type, or some in float32."""


def assert_same_loss(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=2e-6, atol=2e-6)
    for gradient, other in zip(found[1:], expected[1:], strict=True):
        bound = ROUNDING[other.dtype]
        torch.testing.assert_close(gradient, other, rtol=bound, atol=min(bound, 1e-5))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SCENES),
        *((name, dtype) for name in ("few", "many classes") for dtype in (torch.bfloat16, torch.float16)),
    ],
)
@pytest.mark.usefixtures("by_kernels")
def test_sums_and_gradients_are_those_of_torchs_operations(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, expected = both_ways(*outputs(name, dtype, seed=1), monkeypatch)
    assert_same_loss(found, expected)
    assert torch.equal(found[1] != 0, expected[1] != 0) or dtype is not torch.float32
    assert expected[0][3] > 0 or name == "no boxes"


@pytest.mark.usefixtures("by_kernels")
def test_gradients_follow_what_the_sums_are_multiplied_by(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scores, batch = outputs("few", torch.float32)
    found, expected = both_ways(raw, scores, batch, monkeypatch, scale=64.0)
    torch.testing.assert_close(found[1], expected[1], rtol=2e-6, atol=1e-4)
    single = sums_and_gradients(raw, scores, batch)
    assert torch.equal(found[1], 64 * single[1])
    assert torch.equal(found[2], 64 * single[2])


@pytest.mark.parametrize("part", PARTS[:3])
@pytest.mark.usefixtures("by_kernels")
def test_each_part_has_its_own_gradient(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scores, batch = outputs("few", torch.float32)

    def gradients() -> list[Tensor]:
        leaves = raw.clone().requires_grad_(), scores.clone().requires_grad_()
        sums = DetectionLoss(LossConfig(box=2.0, cls=3.0, dfl=5.0), 3, fixed_shapes=True)(leaves, batch)
        return list(torch.autograd.grad(getattr(sums, part), leaves, materialize_grads=True))

    found = gradients()
    monkeypatch.setattr("paceline.losses.detection.usable", lambda device: False)
    for gradient, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-6, atol=1e-6)


@pytest.mark.usefixtures("by_kernels")
def test_the_total_and_its_parts_may_be_asked_for_together(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scores, batch = outputs("few", torch.float32)

    def gradients() -> list[Tensor]:
        leaves = raw.clone().requires_grad_(), scores.clone().requires_grad_()
        sums = DetectionLoss(LossConfig(), 3, fixed_shapes=True)(leaves, batch)
        torch.testing.assert_close(sums.total, sums.box + sums.cls + sums.dfl)
        assert not sums.detach().total.requires_grad
        return list(torch.autograd.grad(sums.total + 2 * sums.box - 3 * sums.cls, leaves))

    found = gradients()
    monkeypatch.setattr("paceline.losses.detection.usable", lambda device: False)
    for gradient, other in zip(found, gradients(), strict=True):
        torch.testing.assert_close(gradient, other, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("name", ["few", "a slot per claim"])
@pytest.mark.usefixtures("by_kernels")
def test_what_padding_holds_means_nothing(name: str) -> None:
    raw, scores, batch = outputs(name, torch.float32)
    expected = sums_and_gradients(raw, scores, batch)
    batch.boxes[~batch.valid] = torch.tensor([0.0, 0.0, 90.0, 60.0])
    batch.labels[~batch.valid] = 2
    for value, other in zip(sums_and_gradients(raw, scores, batch), expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.usefixtures("by_kernels")
def test_views_with_the_points_last_give_the_same() -> None:
    raw, scores, batch = outputs("few", torch.float32)
    views = raw.mT.contiguous().mT, scores.mT.contiguous().mT
    assert not views[0].is_contiguous()
    for value, other in zip(sums_and_gradients(*views, batch), sums_and_gradients(raw, scores, batch), strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("size", [1e3, 1e4])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy's, in the sigmoid
@pytest.mark.usefixtures("by_kernels")
def test_extreme_outputs_have_a_finite_loss_and_gradient(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scores, batch = outputs("dense", torch.float32)
    found, expected = both_ways(raw * size, scores * size, batch, monkeypatch)
    assert all(value.isfinite().all() for value in found)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("by_kernels")
def test_boxes_without_extent_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, scores, batch = outputs("dense", torch.float32)
    batch.boxes[:, :3, 2:] = batch.boxes[:, :3, :2]
    batch.boxes[0, 3, 2] = batch.boxes[0, 3, 0]
    found, expected = both_ways(raw, scores, batch, monkeypatch)
    assert all(value.isfinite().all() for value in found)
    assert_same_loss(found, expected)


@pytest.mark.usefixtures("by_kernels")
def test_sides_that_meet_share_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([torch.tensor([[4.0, 4.0, 28.0, 28.0]])], [torch.tensor([0])], (32, 32), 1)
    raw = raw_of(torch.tensor([4.0, 4.0, 28.0, 28.0]).expand(21, 4), (32, 32))
    sides = torch.full((21, 4, 16), -300.0)  # one bin alone: the predicted sides are exact
    sides[5, :, 1] = 0.0  # point 5 at (12, 12), 8 px to each side: a square inside, two of whose sides meet the box
    raw[0, 5] = sides[5].flatten()
    found, expected = both_ways(raw, torch.zeros(1, 21, 1), batch, monkeypatch)
    assert_same_loss(found, expected)
    assert found[0][3] > 0


@pytest.mark.usefixtures("by_kernels")
def test_many_small_terms_are_summed_as_well_as_by_torch() -> None:
    _, scores, batch = outputs("many classes", torch.float32)
    scores = scores - 12  # softplus(x) is about exp(x) there, which vanishes beside 1
    raw = torch.zeros(*scores.shape[:2], 64)
    batch.valid[:] = False
    expected = 0.5 * torch.nn.functional.softplus(scores.double()).sum()
    torch.testing.assert_close(sums_and_gradients(raw, scores, batch)[0][1].double(), expected, rtol=5e-7, atol=0)


@pytest.mark.parametrize("strides", [(8, 16, 32, 64), (4, 8, 16, 32), (16, 32)])
@pytest.mark.usefixtures("by_kernels")
def test_there_may_be_any_levels_whose_strides_double(
    strides: tuple[int, ...], by_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, batch = random_scene(3, (5, 0, 9), size_hw=(128, 192), sides=(5.0, 90.0))
    num_points = len(anchor_points(batch.size_hw, strides)[0])
    raw, scores = torch.randn(3, num_points, 64), torch.randn(3, num_points, 3) - 1
    started = []
    start = by_kernels.start_kernel
    monkeypatch.setattr(by_kernels, "start_kernel", lambda *given, **set_: started.append(start(*given, **set_)))
    criterion = DetectionLoss(LossConfig(), 3, strides=strides)
    criterion.assigner = TaskAlignedAssigner(least_side_px=16.0, fixed_shapes=True)

    def found() -> list[Tensor]:
        leaves = raw.clone().requires_grad_(), scores.clone().requires_grad_()
        sums = criterion(leaves, batch)
        return [sums.total.detach(), sums.normaliser, *torch.autograd.grad(sums.total, leaves)]

    by_kernels_alone = found()
    assert started
    with monkeypatch.context() as patch:
        patch.setattr("paceline.losses.detection.usable", lambda device: False)
        expected = found()
    assert expected[1] > 0
    for value, other in zip(by_kernels_alone, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2e-6, atol=5e-6)


def test_boxes_that_reach_beyond_the_image_claim_what_is_inside(interpreted: ModuleType) -> None:
    raw, scores, batch = outputs("dense", torch.float32)
    batch.boxes[:, 0] = torch.tensor([-500.0, -20.0, 1e6, 40.0])
    batch.boxes[:, 1] = torch.tensor([-90.0, -90.0, -30.0, -30.0])  # outside
    batch.boxes[:, 2] = torch.tensor([200.0, 10.0, 300.0, 20.0])  # outside
    batch.boxes[:, 3] = torch.tensor([90.0, 60.0, 200.0, 200.0])
    assert_same_targets(assigned(interpreted, raw, scores, batch), plain_scene(raw, scores, batch))


@pytest.mark.parametrize("logit", [-85.0, -20.0, -8.0, -1.0, -0.01, 0.0, 0.01, 1.0, 8.0, 20.0, 1000.0])
@pytest.mark.usefixtures("by_kernels")
def test_cross_entropies_are_summed_to_a_millionth(logit: float) -> None:
    _, _, batch = outputs("no boxes", torch.float32)
    scores = logit + 0.001 * torch.arange(2 * 126 * 3, dtype=torch.float32).view(2, 126, 3)
    expected = 0.5 * torch.nn.functional.softplus(scores.double()).sum()
    found = sums_and_gradients(torch.zeros(2, 126, 64), scores, batch)
    torch.testing.assert_close(found[0][1].double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found[2].double(), 0.5 * scores.double().sigmoid(), rtol=1e-6, atol=1e-37)


def test_what_kernels_cannot_take_is_left_to_torchs_operations(
    by_kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []
    monkeypatch.setattr(by_kernels, "sums", lambda *given: taken.append(given) or (torch.zeros(()),) * 5)
    raw, scores, batch = outputs("few", torch.float32)
    DetectionLoss(LossConfig(), 3)((raw, scores), batch)
    assert len(taken) == 1
    DetectionLoss(LossConfig(), 3)((raw.double(), scores.double()), batch)
    DetectionLoss(LossConfig(), 3, reg_max=12)((raw[..., :48], scores), batch)
    thirds = DetectionLoss(LossConfig(), 3, strides=(8, 24))
    thirds((raw[:, :60], scores[:, :60]), dataclasses.replace(batch, images=batch.images[..., :48, :72]))
    DetectionLoss(LossConfig(), 3, assigner=lambda scene: TaskAlignedAssigner()(scene))((raw, scores), batch)  # type: ignore[arg-type]
    torch.compile(DetectionLoss(LossConfig(), 3).__call__, fullgraph=True, backend="eager")((raw, scores), batch)
    monkeypatch.undo()
    DetectionLoss(LossConfig(), 3)((raw, scores), batch)
    assert len(taken) == 1
