"""The loss against measured answers of the reference implementation: reduced ones in `fixtures`, whole ones beside."""

from pathlib import Path

import numpy as np
import pytest
import torch
from loss_reference import make_batch

from paceline.boxes import cxcywh_to_xyxy
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = ("seed1_nc5", "seed2_nc80")
TOLERANCE = 2e-6


def read(path):
    with np.load(path) as archive:
        return {name: torch.from_numpy(archive[name]) for name in archive.files}


def batch_of(oracle):
    height, width = oracle["image_hw"].tolist()
    boxes = cxcywh_to_xyxy(oracle["bboxes_xywhn"] * torch.tensor([width, height, width, height]))
    images = [oracle["batch_idx"].long() == image for image in range(4)]
    labels = oracle["cls"].long()
    return make_batch([boxes[of] for of in images], [labels[of] for of in images], (height, width))


def answer(raw, scores, batch):
    """Loss items, and gradients of the total: the sum of the items times the number of images."""
    raw, scores = raw.contiguous().requires_grad_(), scores.contiguous().requires_grad_()
    sums = DetectionLoss(LossConfig(), scores.shape[-1])((raw, scores), batch)
    items = torch.stack((sums.box, sums.cls, sums.dfl)) / sums.normaliser.clamp(min=1)
    return items.detach(), *torch.autograd.grad(items.sum() * len(batch), (raw, scores))


def assert_close_to_the_largest(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_whole_measured_answers(shared, name):
    oracle = read(shared / "facts" / "oracle" / f"loss_{name}.npz")
    items, gradient_raw, gradient_scores = answer(oracle["boxes"].mT, oracle["scores"].mT, batch_of(oracle))
    torch.testing.assert_close(items, oracle["loss_items"], rtol=TOLERANCE, atol=0)
    assert_close_to_the_largest(gradient_raw, oracle["grad_boxes"].mT)
    assert_close_to_the_largest(gradient_scores, oracle["grad_scores"].mT)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_reduced_measured_answers(name):
    oracle = read(FIXTURES / f"{name}.npz")
    inside, learn = oracle["inside"], oracle["learn"]
    raw = torch.zeros(*inside.shape, 64)
    raw[inside] = oracle["raw"]
    items, gradient_raw, gradient_scores = answer(raw, oracle["scores"], batch_of(oracle))
    same = [0, 1, 2] if oracle["scores"].shape[-1] == oracle["num_classes"] else [0, 2]
    torch.testing.assert_close(items[same], oracle["loss_items"][same], rtol=TOLERANCE, atol=0)
    assert_close_to_the_largest(gradient_raw[learn], oracle["grad_raw"])
    assert_close_to_the_largest(gradient_scores[learn], oracle["grad_scores"])
    assert not gradient_raw[~learn].any()
