"""The detection loss once more, slow and obvious, and scenes to try it on: float64, loops, no padding."""

import math
from dataclasses import dataclass

import torch

from paceline.batch import Batch


def make_batch(boxes, labels, size_hw, num_padded=16):
    """Pad lists of boxes (one N4 tensor per image) and labels to a batch."""
    num_images = len(boxes)
    batch = Batch(
        images=torch.zeros(num_images, 3, *size_hw, dtype=torch.uint8),
        boxes=torch.zeros(num_images, num_padded, 4),
        labels=torch.zeros(num_images, num_padded, dtype=torch.int64),
        valid=torch.zeros(num_images, num_padded, dtype=torch.bool),
        samples=torch.arange(num_images),
        original_hw=torch.tensor([size_hw] * num_images),
    )
    for image, (some, classes) in enumerate(zip(boxes, labels, strict=True)):
        batch.boxes[image, : len(some)] = some
        batch.labels[image, : len(some)] = classes
        batch.valid[image, : len(some)] = True
    return batch


def random_scene(seed, counts, *, size_hw=(64, 96), num_classes=3, sides=(2.0, 60.0), num_padded=16):
    """Random raw outputs (BA64, BAK; float64) and a batch with `counts` boxes of sides within `sides` pixels."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size_hw
    num_points = sum((height // s) * (width // s) for s in (8, 16, 32))
    boxes, labels = [], []
    for count in counts:
        lengths = sides[0] + (sides[1] - sides[0]) * torch.rand(count, 2, generator=generator)
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - lengths)
        boxes.append(torch.cat((corner, corner + lengths), dim=-1))
        labels.append(torch.randint(0, num_classes, (count,), generator=generator))
    raw = 1.5 * torch.randn(len(counts), num_points, 64, generator=generator, dtype=torch.float64)
    scores = 1.5 * torch.randn(len(counts), num_points, num_classes, generator=generator, dtype=torch.float64) - 2
    return raw, scores, make_batch(boxes, labels, size_hw, num_padded)


@dataclass
class PlainSums:
    box: torch.Tensor
    cls: torch.Tensor
    dfl: torch.Tensor
    normaliser: float
    targets: dict  # (image, point) -> (ground truth, target score)


def plain_loss(raw, scores, batch, gains=(7.5, 0.5, 1.5), topk=10):
    """Sums of the loss of outputs that need a gradient."""
    height, width = batch.size_hw
    points = [
        ((x + 0.5) * s, (y + 0.5) * s, s) for s in (8, 16, 32) for y in range(height // s) for x in range(width // s)
    ]
    zero = torch.zeros((), dtype=torch.float64)
    sums = PlainSums(box=zero, cls=zero, dfl=zero, normaliser=0.0, targets={})
    for image in range(len(batch)):
        boxes = batch.boxes[image][batch.valid[image]].double().tolist()
        labels = batch.labels[image][batch.valid[image]].tolist()
        predicted = [decode(raw[image, a], points[a]) for a in range(len(points))]
        numbers = [[side.item() for side in box] for box in predicted]
        targets = plain_assignment(numbers, scores[image].tolist(), points, boxes, labels, topk)
        sums.cls = sums.cls + torch.nn.functional.softplus(scores[image]).sum()
        for a, (g, target) in targets.items():
            sums.targets[image, a] = (g, target)
            sums.normaliser += target
            sums.cls = sums.cls - target * scores[image, a, labels[g]]
            sums.box = sums.box + target * (1 - ciou(predicted[a], boxes[g]))
            sums.dfl = sums.dfl + target * side_losses(raw[image, a], points[a], boxes[g])
    sums.box, sums.cls, sums.dfl = (
        gain * part for gain, part in zip(gains, (sums.box, sums.cls, sums.dfl), strict=True)
    )
    return sums


def plain_assignment(predicted, scores, points, boxes, labels, topk):
    """Say which points learn, as a mapping from point to (ground truth, target score)."""
    overlap, alignment, claimants = {}, {}, {}
    for g, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        centre_x, centre_y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        half_w, half_h = max(box[2] - box[0], 16) / 2, max(box[3] - box[1], 16) / 2
        for a, (x, y, _) in enumerate(points):
            if abs(x - centre_x) < half_w and abs(y - centre_y) < half_h:
                overlap[g, a] = max(float(ciou(predicted[a], box)), 0.0)
                alignment[g, a] = (1 / (1 + math.exp(-scores[a][label]))) ** 0.5 * overlap[g, a] ** 6
        candidates = sorted((a for h, a in overlap if h == g), key=lambda a: -alignment[g, a])
        for a in candidates[:topk]:
            if alignment[g, a] > 0:
                claimants.setdefault(a, []).append(g)
    owner = {}
    for a, claiming in claimants.items():
        holders = [g for g in range(len(boxes)) if (g, a) in overlap]
        owner[a] = claiming[0] if len(claiming) == 1 else max(holders, key=lambda g: overlap[g, a])
    targets = {}
    for a, g in owner.items():
        best_overlap = max(overlap[g, other] for other in owner if owner[other] == g)
        best_alignment = max(alignment[g, other] for other in owner if owner[other] == g)
        targets[a] = (g, alignment[g, a] * best_overlap / (best_alignment + 1e-9))
    return targets


def decode(raw, point):
    """Box (four 0-dim tensors) of one point's 64 numbers."""
    x, y, stride = point
    left, top, right, bottom = (raw.view(4, 16).softmax(-1) * torch.arange(16)).sum(-1) * stride
    return x - left, y - top, x + right, y + bottom


def ciou(a, b):
    """CIoU of two boxes of four numbers or tensors each."""
    a, b = ([torch.as_tensor(side, dtype=torch.float64) for side in box] for box in (a, b))
    width = (torch.minimum(a[2], b[2]) - torch.maximum(a[0], b[0])).clamp(min=0)
    height = (torch.minimum(a[3], b[3]) - torch.maximum(a[1], b[1])).clamp(min=0)
    area_a, area_b = (a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1])
    iou = width * height / (area_a + area_b - width * height)
    around = [torch.maximum(a[i + 2], b[i + 2]) - torch.minimum(a[i], b[i]) for i in (0, 1)]
    apart = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    angle = torch.atan((a[2] - a[0]) / (a[3] - a[1])) - torch.atan((b[2] - b[0]) / (b[3] - b[1]))
    v = 4 / math.pi**2 * angle**2
    alpha = (v / (1 - iou + v)).detach() if v > 0 else 0.0
    return iou - (apart[0] ** 2 + apart[1] ** 2) / (around[0] ** 2 + around[1] ** 2) - alpha * v


def side_losses(raw, point, box):
    """Mean over the four sides of the cross-entropy with the two bins around the distance."""
    x, y, stride = point
    total = 0.0
    for side, distance in enumerate((x - box[0], y - box[1], box[2] - x, box[3] - y)):
        distance = min(max(distance / stride, 0.0), 14.99)
        lower = int(distance)
        log_p = raw.view(4, 16)[side].log_softmax(-1)
        total = total - (lower + 1 - distance) * log_p[lower] - (distance - lower) * log_p[lower + 1]
    return total / 4
