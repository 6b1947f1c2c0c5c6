from __future__ import annotations

import math

import pytest
import torch

from paceline.boxes import anchor_points
from paceline.models.heads import DetectionHead


def levels(batch: int, height: int, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, channels, height // stride, width // stride, generator=generator)
        for channels, stride in ((64, 8), (128, 16), (256, 32))
    ]


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("reg_max", [1, 16])
def test_points_follow_level_by_level_row_by_row(depthwise: bool, reg_max: int) -> None:
    head = DetectionHead((64, 128, 256), 3, reg_max=reg_max, depthwise=depthwise).eval()
    maps = levels(2, 64, 96)
    boxes, scores = head(*maps)
    assert boxes.shape == (2, 126, 4 * reg_max)
    assert scores.shape == (2, 126, 3)
    point = 0
    for branch, level in zip(head.cv3, maps, strict=True):
        answer = branch(level)
        for y in range(level.shape[2]):
            for x in range(level.shape[3]):
                torch.testing.assert_close(scores[:, point], answer[:, :, y, x])
                point += 1
    assert point == len(anchor_points((64, 96))[0])


def test_only_joining_copies_the_levels_of_channels_last_maps() -> None:
    head = DetectionHead((64, 128, 256), 3, depthwise=True).to(memory_format=torch.channels_last).eval()
    maps = [level.contiguous(memory_format=torch.channels_last) for level in levels(2, 64, 64)]
    with torch.profiler.profile() as profile:
        outputs = head(*maps)
    assert all(output.is_contiguous() for output in outputs)
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::cat"] == 2
    assert "aten::contiguous" not in counts
    assert "aten::clone" not in counts


@pytest.mark.parametrize("num_classes", [1, 3, 80, 200])
def test_the_head_starts_with_small_boxes_and_rare_objects(num_classes: int) -> None:
    head = DetectionHead((64, 128, 256), num_classes, depthwise=True)
    for branch, class_branch, stride in zip(head.cv2, head.cv3, (8, 16, 32), strict=True):
        assert torch.all(branch.get_parameter("2.bias") == 2.0)
        expected = math.log(5 / num_classes / (640 / stride) ** 2)
        torch.testing.assert_close(class_branch.get_parameter("2.bias"), torch.full((num_classes,), expected))


def test_bins_are_fixed() -> None:
    weight = DetectionHead((64, 128, 256), 3, depthwise=True).get_parameter("dfl.conv.weight")
    assert torch.equal(weight.flatten(), torch.arange(16.0))
    assert not weight.requires_grad
    assert not hasattr(DetectionHead((64, 128, 256), 3, reg_max=1, depthwise=True), "dfl")


@pytest.mark.parametrize(("num_classes", "width"), [(1, 64), (64, 64), (80, 80), (100, 100), (365, 100)])
def test_class_branches_widen_with_the_number_of_classes(num_classes: int, width: int) -> None:
    head = DetectionHead((64, 128, 256), num_classes, depthwise=False)
    assert head.get_parameter("cv3.0.2.weight").shape == (num_classes, width, 1, 1)
