import dataclasses

import pytest
import torch
from loss_reference import plain_loss, random_scene

from paceline.boxes import anchor_points
from paceline.losses.assign import Assignment
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss, distribution_focal_loss

PARTS = ("box", "cls", "dfl", "normaliser")


def sums_and_gradients(raw, scores, batch, loss=None):
    """Parts of the loss as one tensor, and the gradients of its undivided total."""
    raw, scores = raw.detach().requires_grad_(), scores.detach().requires_grad_()
    sums = (loss or DetectionLoss(LossConfig(), scores.shape[-1]))((raw, scores), batch)
    gradients = torch.autograd.grad(sums.total, (raw, scores))
    return torch.stack([getattr(sums, part).detach() for part in PARTS]), *gradients


def select(batch, images):
    return type(batch)(**{f.name: getattr(batch, f.name)[images] for f in dataclasses.fields(batch)})


def assert_equal(found, expected, tolerance=1e-12):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"counts": (3, 0, 1)},
        {"counts": (12, 5), "sides": (20.0, 60.0)},
        {"counts": (6, 6), "sides": (0.5, 9.0), "num_classes": 20},
        {"counts": (0, 0)},
    ],
    ids=["few", "dense", "tiny", "empty"],
)
def test_equals_the_plain_loss_and_its_gradient(settings):
    raw, scores, batch = random_scene(0, **settings)
    found = sums_and_gradients(raw, scores, batch)
    raw.requires_grad_(), scores.requires_grad_()
    plain = plain_loss(raw, scores, batch)
    gradients = torch.autograd.grad(plain.box + plain.cls + plain.dfl, (raw, scores), materialize_grads=True)
    parts = torch.stack([plain.box, plain.cls, plain.dfl, torch.tensor(plain.normaliser, dtype=torch.float64)])
    assert_equal(found, (parts.detach(), *gradients), 1e-8)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    raw, scores, batch = random_scene(1, (4, 0, 7, 1, 2, 3))
    parts, *gradients = sums_and_gradients(raw, scores, batch)
    whole = [len(batch) * gradient / parts[3].clamp(min=1) for gradient in gradients]

    pieces = [torch.tensor(images) for images in ([0], [1, 2], [3, 4, 5])]
    answers = [sums_and_gradients(raw[images], scores[images], select(batch, images)) for images in pieces]
    normaliser = sum(answer[0][3] for answer in answers).clamp(min=1)
    for index, expected in enumerate(whole, start=1):
        accumulated = torch.cat([answer[index] for answer in answers])
        torch.testing.assert_close(len(batch) * accumulated / normaliser, expected, rtol=1e-12, atol=1e-12)
    assert_equal([sum(answer[0] for answer in answers)], [parts])


def test_the_order_of_ground_truths_means_nothing():
    raw, scores, batch = random_scene(2, (16, 16, 16), sides=(10.0, 60.0))
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    shuffled = dataclasses.replace(
        batch,
        boxes=batch.boxes.gather(1, order.unsqueeze(-1).expand(-1, -1, 4)),
        labels=batch.labels.gather(1, order),
        valid=batch.valid.gather(1, order),
    )
    assert not torch.equal(shuffled.boxes, batch.boxes)
    assert_equal(sums_and_gradients(raw, scores, shuffled), sums_and_gradients(raw, scores, batch))


def test_the_order_of_images_means_nothing():
    raw, scores, batch = random_scene(3, (4, 0, 7, 1))
    order = torch.tensor([2, 0, 3, 1])
    parts, *gradients = sums_and_gradients(raw, scores, batch)
    expected = (parts, *(gradient[order] for gradient in gradients))
    assert_equal(sums_and_gradients(raw[order], scores[order], select(batch, order)), expected)


def test_padding_means_nothing():
    raw, scores, batch = random_scene(4, (4, 0, 7))
    gaps = torch.arange(3, 35, 2)
    spread = dataclasses.replace(
        batch,
        boxes=torch.full((3, 40, 4), 7.0).index_copy(1, gaps, batch.boxes),
        labels=torch.ones(3, 40, dtype=torch.int64).index_copy(1, gaps, batch.labels),
        valid=torch.zeros(3, 40, dtype=torch.bool).index_copy(1, gaps, batch.valid),
    )
    assert_equal(sums_and_gradients(raw, scores, spread), sums_and_gradients(raw, scores, batch))


def flip(values, size_hw):
    """Mirror BA... along x, level by level."""
    flipped, start = [], 0
    for stride in (8, 16, 32):
        height, width = size_hw[0] // stride, size_hw[1] // stride
        level = values[:, start : start + height * width].unflatten(1, (height, width))
        flipped.append(level.flip(2).flatten(1, 2))
        start += height * width
    return torch.cat(flipped, dim=1)


def flip_raw(raw, size_hw):
    """Mirror box outputs BA64: the points, and the left side with the right."""
    return flip(raw, size_hw).unflatten(-1, (4, 16))[:, :, [2, 1, 0, 3]].flatten(-2)


def test_a_flipped_image_has_the_same_loss_and_the_flipped_gradient():
    raw, scores, batch = random_scene(5, (4, 0, 9), size_hw=(64, 96))
    x1, y1, x2, y2 = batch.boxes.unbind(-1)
    mirrored = dataclasses.replace(batch, boxes=torch.stack((96 - x2, y1, 96 - x1, y2), dim=-1))
    parts, gradient_raw, gradient_scores = sums_and_gradients(raw, scores, batch)
    found = sums_and_gradients(flip_raw(raw, (64, 96)), flip(scores, (64, 96)), mirrored)
    # The boxes are float32: 96 - x is rounded.
    assert_equal(found, (parts, flip_raw(gradient_raw, (64, 96)), flip(gradient_scores, (64, 96))), 1e-4)


def test_without_boxes_only_classes_are_learnt():
    raw, scores, batch = random_scene(6, (0, 0))
    parts, gradient_raw, gradient_scores = sums_and_gradients(raw, scores, batch)
    assert parts[[0, 2, 3]].tolist() == [0, 0, 0]
    assert torch.equal(gradient_raw, torch.zeros_like(raw))
    torch.testing.assert_close(gradient_scores, 0.5 * scores.sigmoid())


@pytest.mark.parametrize("size", [1e3, 1e4])
def test_extreme_outputs_have_a_finite_loss_and_gradient(size):
    raw, scores, batch = random_scene(7, (4, 9))
    answers = sums_and_gradients(raw.float() * size, scores.float() * size, batch)
    assert all(answer.isfinite().all() for answer in answers)


def test_boxes_without_extent_do_no_harm():
    raw, scores, batch = random_scene(8, (4, 9))
    batch.boxes[:, :3, 2:] = batch.boxes[:, :3, :2]
    batch.boxes[0, 3, 2] = batch.boxes[0, 3, 0]
    assert all(answer.isfinite().all() for answer in sums_and_gradients(raw.float(), scores.float(), batch))


def test_gains_weigh_the_parts():
    raw, scores, batch = random_scene(9, (4, 9))
    loss = DetectionLoss(LossConfig(box=2.0, cls=3.0, dfl=5.0), 3)
    ones = DetectionLoss(LossConfig(box=1.0, cls=1.0, dfl=1.0), 3)
    parts = sums_and_gradients(raw, scores, batch, loss)[0]
    expected = sums_and_gradients(raw, scores, batch, ones)[0] * torch.tensor([2, 3, 5, 1])
    torch.testing.assert_close(parts, expected)


def test_the_normaliser_carries_no_gradient_and_all_parts_are_scalars():
    raw, scores, batch = random_scene(10, (4, 9))
    sums = DetectionLoss(LossConfig(), 3)((raw.float().requires_grad_(), scores.float().requires_grad_()), batch)
    assert not sums.normaliser.requires_grad
    assert sums.total.requires_grad
    assert all(getattr(sums, part).shape == () and getattr(sums, part).dtype == torch.float32 for part in PARTS)


def test_half_precision_is_lifted_before_anything_is_computed():
    raw, scores, batch = random_scene(11, (4, 9))
    raw, scores = raw.bfloat16(), scores.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts, gradient_raw, gradient_scores = sums_and_gradients(raw, scores, batch)
    assert (parts.dtype, gradient_raw.dtype, gradient_scores.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = sums_and_gradients(raw.float(), scores.float(), batch)
    assert torch.equal(parts, expected[0])
    torch.testing.assert_close(gradient_raw, expected[1].bfloat16())


def test_outputs_may_be_views_with_the_points_last():
    raw, scores, batch = random_scene(12, (4, 9))
    views = raw.mT.contiguous().mT, scores.mT.contiguous().mT
    assert not views[0].is_contiguous()
    assert_equal(sums_and_gradients(*views, batch), sums_and_gradients(raw, scores, batch))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_one_graph_equals_eager(backend):
    raw, scores, batch = random_scene(13, (4, 0, 9))
    loss = DetectionLoss(LossConfig(), 3)
    torch._dynamo.reset()
    compiled = torch.compile(loss.__call__, fullgraph=True, backend=backend)
    found = sums_and_gradients(raw, scores, batch, compiled)
    assert_equal(found, sums_and_gradients(raw, scores, batch, loss))


def test_gradients_are_those_of_finite_differences():
    """With the assignment held fast; without the box part, whose `alpha` is held fast too."""
    raw, scores, batch = random_scene(14, (2,), size_hw=(32, 32), sides=(10.0, 30.0))
    generator = torch.Generator().manual_seed(0)
    fixed = Assignment(
        ground_truth=torch.randint(0, 2, (1, 21), generator=generator),
        target_score=torch.rand(1, 21, generator=generator, dtype=torch.float64).clamp(min=0.5) - 0.5,
    )
    loss = DetectionLoss(LossConfig(box=0.0), 3, assigner=lambda scene: fixed)
    raw, scores = raw.requires_grad_(), scores.requires_grad_()
    assert torch.autograd.gradcheck(lambda *outputs: loss(outputs, batch).total, (raw, scores), fast_mode=True)


def test_focal_loss_is_least_where_the_mean_of_the_distribution_is_the_distance():
    distance = torch.tensor([0.0, 3.25, 7.0, 14.99], dtype=torch.float64)
    best = torch.full((4, 16), -40.0, dtype=torch.float64)
    for side, value in enumerate(distance.tolist()):
        lower = min(int(value), 14)
        best[side, lower] = torch.tensor(max(lower + 1 - value, 1e-17)).log()
        best[side, lower + 1] = torch.tensor(max(value - lower, 1e-17)).log()
    least = distribution_focal_loss(best.flatten(), distance)
    generator = torch.Generator().manual_seed(0)
    others = best + 0.3 * torch.randn(50, 4, 16, generator=generator, dtype=torch.float64)
    assert (distribution_focal_loss(others.flatten(-2), distance.expand(50, 4)) > least).all()


def test_focal_loss_clamps_distances_out_of_reach():
    raw = torch.randn(64, generator=torch.Generator().manual_seed(0))
    beyond = torch.tensor([-3.0, 15.0, 99.0, 14.995])
    within = torch.tensor([0.0, 14.99, 14.99, 14.99])
    assert torch.equal(distribution_focal_loss(raw, beyond), distribution_focal_loss(raw, within))


def test_wrong_widths_are_our_own_mistakes():
    raw, scores, batch = random_scene(15, (1,))
    with pytest.raises(AssertionError):
        DetectionLoss(LossConfig(), 4)((raw, scores), batch)
    with pytest.raises(AssertionError):
        DetectionLoss(LossConfig(), 3, reg_max=8)((raw, scores), batch)
    assert raw.shape[1] == len(anchor_points(batch.size_hw)[0])
