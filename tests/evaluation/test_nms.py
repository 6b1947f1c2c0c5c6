from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paceline.boxes import pairwise_iou
from paceline.evaluation import nms
from paceline.evaluation.nms import batched_nms
from paceline.native.suppression import SUPPRESSION


def greedy_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, iou: float, max_det: int, agnostic: bool = False
) -> list[int]:
    """The plain rule, one image: best score first, of equal ones the first; a kept box suppresses others."""
    suppresses = (pairwise_iou(boxes, boxes) > iou) & (agnostic | (labels[:, None] == labels))
    suppressed = torch.zeros(len(scores), dtype=torch.bool)
    kept: list[int] = []
    for i in sorted(range(len(scores)), key=scores.neg().tolist().__getitem__):
        if not suppressed[i]:
            kept.append(i)
            suppressed |= suppresses[i]
    return kept[:max_det]


def random_candidates(
    seed: int, images: int, number: int, *, classes: int = 3, crowded: float = 100.0
) -> tuple[Tensor, ...]:
    """Integer corners and coarse scores: equal boxes, equal scores and overlaps equal to the limit all occur."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand((images, number, 2), generator=random) * crowded
    side = torch.rand((images, number, 2), generator=random) * 40
    boxes = torch.cat((corner, corner + side), dim=-1)
    scores = torch.rand((images, number), generator=random)
    if seed % 2:
        boxes, scores = (boxes / 4).round() * 4, (scores * 10).round() / 10
    labels = torch.randint(0, classes, (images, number), generator=random)
    valid = torch.rand((images, number), generator=random) < 0.9
    return boxes, scores, labels, valid


@pytest.fixture(params=["compiled", "by torch"], autouse=True)
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test both ways."""
    if request.param == "by torch":
        monkeypatch.setattr(SUPPRESSION, "get", lambda: None)
    elif SUPPRESSION.get() is None:
        pytest.skip("the kernel was not built")


@pytest.fixture(params=["one image at a time", "all images at once"])
def grouping(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run both ways of grouping images on the CPU; small blocks make few boxes go through every branch."""
    monkeypatch.setattr(nms, "HEAD", 8)
    monkeypatch.setattr(nms, "WINDOW", 40)
    monkeypatch.setattr(nms, "IMAGES_AT_ONCE", {"cpu": 1 if request.param.startswith("one") else 3})
    return str(request.param)


@pytest.mark.usefixtures("grouping")
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("iou", "max_det", "agnostic"), [(0.7, 300, False), (0.45, 20, False), (0.5, 300, True)])
def test_agrees_with_the_plain_greedy_rule(seed: int, iou: float, max_det: int, agnostic: bool) -> None:
    boxes, scores, labels, valid = random_candidates(seed, images=4, number=150)
    valid[1] = False
    kept = batched_nms(boxes, scores, labels, valid, iou=iou, max_det=max_det, agnostic=agnostic)
    for image in range(4):
        places = valid[image].nonzero()[:, 0]
        expected = greedy_reference(
            boxes[image, places],
            scores[image, places],
            labels[image, places],
            iou=iou,
            max_det=max_det,
            agnostic=agnostic,
        )
        count = int(kept.count[image])
        assert kept.indices[image, :count].tolist() == places[expected].tolist()
        assert kept.indices[image, count:].eq(0).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_plain_greedy_rule_over_several_windows(seed: int) -> None:
    boxes, scores, labels, valid = random_candidates(seed, images=2, number=2 * nms.WINDOW + 100, crowded=150.0)
    kept = batched_nms(boxes, scores, labels, valid, iou=0.3, max_det=1000)
    for image in range(2):
        places = valid[image].nonzero()[:, 0]
        expected = greedy_reference(
            boxes[image, places], scores[image, places], labels[image, places], iou=0.3, max_det=1000
        )
        assert kept.indices[image, : int(kept.count[image])].tolist() == places[expected].tolist()


def test_a_chain_of_suppression_is_followed_to_its_end() -> None:
    """Each box overlaps the next alone: every second one stays."""
    left = torch.arange(100.0) * 4
    boxes = torch.stack((left, torch.zeros(100), left + 10, torch.full((100,), 10.0)), dim=-1)[None]
    scores = torch.linspace(1, 0.5, 100)[None]
    labels = torch.zeros((1, 100), dtype=torch.int64)
    kept = batched_nms(boxes, scores, labels, labels == 0, iou=0.4, max_det=300)
    assert kept.indices[0, : int(kept.count[0])].tolist() == list(range(0, 100, 2))


def test_batched_equals_one_by_one() -> None:
    boxes, scores, labels, valid = random_candidates(5, images=5, number=200)
    together = batched_nms(boxes, scores, labels, valid, iou=0.6, max_det=50)
    for image in range(5):
        one = slice(image, image + 1)
        alone = batched_nms(boxes[one], scores[one], labels[one], valid[one], iou=0.6, max_det=50)
        assert torch.equal(alone.indices[0], together.indices[image])
        assert torch.equal(alone.count[0], together.count[image])


def test_what_is_kept_is_kept_again() -> None:
    boxes, scores, labels, valid = random_candidates(2, images=1, number=300)
    kept = batched_nms(boxes, scores, labels, valid, iou=0.5, max_det=300)
    places = kept.indices[:, : int(kept.count[0])]
    again = batched_nms(
        boxes[:, places[0]], scores[:, places[0]], labels[:, places[0]], places >= 0, iou=0.5, max_det=300
    )
    assert again.indices[0, : int(again.count[0])].tolist() == list(range(places.shape[1]))


def test_an_overlap_equal_to_the_limit_stays() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0.0, 0, 10, 5], [0.0, 0, 10, 5.1]]])
    scores = torch.tensor([[0.9, 0.8, 0.1]])
    labels = torch.zeros((1, 3), dtype=torch.int64)
    kept = batched_nms(boxes, scores, labels, labels == 0, iou=0.5, max_det=9)
    assert kept.indices[0, : int(kept.count[0])].tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(0, 10), (3, 0), (3, 5)])
def test_nothing_gives_nothing(shape: tuple[int, int]) -> None:
    nothing = torch.zeros(shape, dtype=torch.int64)
    kept = batched_nms(torch.zeros((*shape, 4)), nothing.float(), nothing, nothing.bool(), iou=0.5, max_det=7)
    assert kept.indices.shape == (shape[0], 7)
    assert kept.count.tolist() == [0] * shape[0]


def test_both_ways_keep_the_same_of_an_untrained_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of boxes with scores that differ little, in sides that are no round numbers."""
    candidates = random_candidates(8, images=3, number=7000, classes=2, crowded=320.0)
    compiled = batched_nms(*candidates, iou=0.7, max_det=300)
    monkeypatch.setattr(SUPPRESSION, "get", lambda: None)
    by_torch = batched_nms(*candidates, iou=0.7, max_det=300)
    assert torch.equal(compiled.indices, by_torch.indices)
    assert torch.equal(compiled.count, by_torch.count)


@pytest.mark.gpu
def test_a_gpu_keeps_the_same_boxes() -> None:
    candidates = random_candidates(4, images=40, number=3000, crowded=300.0)
    here = batched_nms(*candidates, iou=0.6, max_det=300)
    there = batched_nms(*(tensor.cuda() for tensor in candidates), iou=0.6, max_det=300)
    assert torch.equal(here.indices, there.indices.cpu())
    assert torch.equal(here.count, there.count.cpu())
