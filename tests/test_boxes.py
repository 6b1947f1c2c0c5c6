import math

import pytest
import torch

from paceline.boxes import (
    anchor_points,
    aspect_angle,
    box_distances,
    ciou_of_sides,
    cxcywh_to_xyxy,
    decode_boxes,
    distances_to_boxes,
    expected_distances,
    paired_ciou,
    pairwise_iou,
    xyxy_to_cxcywh,
)


def random_boxes(*shape, seed=0, size=100.0):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64) * size
    return torch.cat((corners.amin(-2), corners.amax(-2)), dim=-1)


def plain_iou(a, b):
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    common = width * height
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def plain_ciou(a, b):
    iou = plain_iou(a, b)
    diagonal = math.dist((min(a[0], b[0]), min(a[1], b[1])), (max(a[2], b[2]), max(a[3], b[3])))
    centres = math.dist(((a[0] + a[2]) / 2, (a[1] + a[3]) / 2), ((b[0] + b[2]) / 2, (b[1] + b[3]) / 2))
    angle = math.atan((a[2] - a[0]) / (a[3] - a[1])) - math.atan((b[2] - b[0]) / (b[3] - b[1]))
    v = 4 / math.pi**2 * angle**2
    return iou - (centres / diagonal) ** 2 - (v / (1 - iou + v) * v if v else 0)


def test_formats_round_trip():
    boxes = random_boxes(5, 7)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(boxes)), boxes)
    assert xyxy_to_cxcywh(torch.tensor([2.0, 4.0, 6.0, 12.0])).tolist() == [4, 8, 4, 8]


def test_iou_equals_the_plain_formula_and_is_symmetric():
    a, b = random_boxes(2, 9, seed=1), random_boxes(2, 6, seed=2)
    iou = pairwise_iou(a, b)
    assert iou.shape == (2, 9, 6)
    for image in range(2):
        expected = [[plain_iou(x, y) for y in b[image].tolist()] for x in a[image].tolist()]
        torch.testing.assert_close(iou[image], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(iou, pairwise_iou(b, a).mT)
    assert iou.amin() >= 0
    assert iou.amax() <= 1


def test_iou_of_a_box_with_itself_is_one_and_of_nothing_zero():
    boxes = random_boxes(8).float()
    assert torch.equal(pairwise_iou(boxes, boxes).diagonal(), torch.ones(8))
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert pairwise_iou(point, point).item() == 0
    assert pairwise_iou(boxes, torch.zeros(0, 4)).shape == (8, 0)


def test_ciou_equals_the_plain_formula_and_is_symmetric():
    a, b = random_boxes(200, seed=3), random_boxes(200, seed=4)
    expected = [plain_ciou(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    torch.testing.assert_close(paired_ciou(a, b), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(paired_ciou(a, b), paired_ciou(b, a))


def test_ciou_is_at_most_iou_and_one_for_equal_boxes():
    a, b = random_boxes(200, seed=5), random_boxes(200, seed=6)
    assert (paired_ciou(a, b) <= pairwise_iou(a, b).diagonal() + 1e-12).all()
    assert torch.equal(paired_ciou(a.float(), a.float()), torch.ones(200))


@pytest.mark.parametrize("factor", [1e-2, 1e3])
def test_overlaps_do_not_depend_on_the_unit(factor):
    a, b = random_boxes(50, seed=7), random_boxes(50, seed=8)
    torch.testing.assert_close(paired_ciou(a * factor, b * factor), paired_ciou(a, b), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(pairwise_iou(a * factor, b * factor), pairwise_iou(a, b), rtol=1e-6, atol=1e-6)


def test_ciou_of_pairs_by_broadcasting_equals_one_by_one():
    a, b = random_boxes(4, seed=9), random_boxes(6, seed=10)
    table = ciou_of_sides(
        [side.unsqueeze(1) for side in a.unbind(-1)], b.unbind(-1), aspect_angle(a).unsqueeze(1), aspect_angle(b)
    )
    assert torch.equal(table, torch.stack([paired_ciou(box.expand(6, 4), b) for box in a]))


def test_weight_of_the_aspect_penalty_carries_no_gradient():
    a = torch.tensor([0.0, 0.0, 10.0, 30.0], dtype=torch.float64)
    b = torch.tensor([5.0, 5.0, 45.0, 25.0], dtype=torch.float64)

    def gradient(alpha):
        x = a.clone().requires_grad_()
        angle = aspect_angle(x) - aspect_angle(b)
        penalty = 4 / math.pi**2 * angle**2
        iou = pairwise_iou(x[None], b[None])[0, 0]
        rest = paired_ciou(x, b) + (penalty / (1 - iou + penalty)).detach() * penalty
        return torch.autograd.grad(rest - alpha(penalty, iou) * penalty, x)[0]

    x = a.clone().requires_grad_()
    (ours,) = torch.autograd.grad(paired_ciou(x, b), x)
    constant = gradient(lambda penalty, iou: (penalty / (1 - iou + penalty)).detach())
    moving = gradient(lambda penalty, iou: penalty / (1 - iou + penalty))
    torch.testing.assert_close(ours, constant)
    assert not torch.allclose(ours, moving)


@pytest.mark.parametrize(
    "box",
    [[5, 5, 5, 5], [5, 5, 9, 5], [5, 5, 5, 9], [9, 9, 5, 5], [9, 5, 5, 9], [0, 0, 1e5, 1e-3], [1e6, 1e6, 2e6, 2e6]],
)
@pytest.mark.parametrize("other", [[5, 5, 5, 5], [2, 2, 12, 8], [5, 5, 9, 5]])
def test_degenerate_boxes_have_finite_overlaps_and_gradients(box, other):
    a = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    b = torch.tensor([other], dtype=torch.float32, requires_grad=True)
    total = paired_ciou(a, b).sum() + pairwise_iou(a, b).sum()
    assert total.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(total, (a, b)))


def test_anchor_points_are_cell_centres_level_by_level():
    points, strides = anchor_points((64, 96), (8, 16, 32))
    expected = [
        ((x + 0.5) * stride, (y + 0.5) * stride, stride)
        for stride in (8, 16, 32)
        for y in range(64 // stride)
        for x in range(96 // stride)
    ]
    assert torch.cat((points, strides[:, None]), dim=1).tolist() == [list(row) for row in expected]
    assert len(anchor_points((640, 640))[0]) == 8400


def test_anchor_points_obey_the_dtype_and_refuse_odd_sizes():
    points, strides = anchor_points((32, 32), dtype=torch.float64, device="meta")
    assert (points.dtype, strides.dtype, points.device.type) == (torch.float64, torch.float64, "meta")
    with pytest.raises(AssertionError):
        anchor_points((40, 64))


def test_distances_round_trip():
    points, _ = anchor_points((64, 64))
    boxes = random_boxes(3, len(points)).float()
    torch.testing.assert_close(distances_to_boxes(points, box_distances(points, boxes)), boxes)


def test_expected_distance_of_a_sure_bin_is_the_bin():
    bins = torch.randint(0, 16, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    raw = torch.nn.functional.one_hot(bins, 16).float().flatten(-2) * 200
    torch.testing.assert_close(expected_distances(raw), bins.float())
    even = expected_distances(torch.zeros(1, 1, 64))
    torch.testing.assert_close(even, torch.full((1, 1, 4), 7.5))


def test_expected_distances_equal_the_plain_formula():
    raw = torch.randn(2, 3, 4 * 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    distances = expected_distances(raw)
    for image in range(2):
        for point in range(3):
            for side in range(4):
                weights = [math.exp(x) for x in raw[image, point, 5 * side : 5 * side + 5]]
                mean = sum(k * w for k, w in enumerate(weights)) / sum(weights)
                assert distances[image, point, side].item() == pytest.approx(mean, abs=1e-12)


def test_one_bin_is_the_distance_itself_and_a_view_is_read_rightly():
    raw = torch.randn(2, 6, 4)
    assert torch.equal(expected_distances(raw), raw)
    wide = torch.randn(2, 64, 6)
    torch.testing.assert_close(expected_distances(wide.mT), expected_distances(wide.mT.contiguous()))


def test_decoding_puts_the_box_around_its_point_in_pixels():
    points, strides = anchor_points((32, 32))
    boxes = decode_boxes(torch.zeros(1, len(points), 64), points, strides)
    expected = [[x - 7.5 * s, y - 7.5 * s, x + 7.5 * s, y + 7.5 * s] for (x, y), s in zip(points, strides, strict=True)]
    torch.testing.assert_close(boxes[0], torch.tensor(expected))


def test_decoding_commutes_with_a_flip():
    points, strides = anchor_points((32, 64), dtype=torch.float64)
    raw = torch.randn(1, len(points), 4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    boxes = decode_boxes(raw.flatten(-2), points, strides)
    flipped_points = torch.stack((64 - points[:, 0], points[:, 1]), dim=-1)
    flipped = decode_boxes(raw[:, :, [2, 1, 0, 3]].flatten(-2), flipped_points, strides)
    x1, y1, x2, y2 = boxes.unbind(-1)
    torch.testing.assert_close(flipped, torch.stack((64 - x2, y1, 64 - x1, y2), dim=-1))
