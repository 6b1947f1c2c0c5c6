"""Stand-in for torchvision.ops where no build of torchvision matches torch; counts the seconds that it takes."""

import time

import numpy as np
import torch

seconds = 0.0


def nms(boxes, scores, iou_threshold):
    """Greedy NMS: indices of the kept boxes, best first."""
    global seconds
    start = time.perf_counter()
    box = boxes.detach().cpu().numpy()
    order = scores.detach().cpu().numpy().argsort()[::-1]
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    keep = []
    while order.size:
        best, rest = order[0], order[1:]
        keep.append(best)
        size = np.minimum(box[best, 2:], box[rest, 2:]) - np.maximum(box[best, :2], box[rest, :2])
        overlap = size.clip(0).prod(1)
        order = rest[overlap / (area[best] + area[rest] - overlap + 1e-9) <= iou_threshold]
    kept = torch.as_tensor(np.array(keep, dtype=np.int64), device=boxes.device)
    seconds += time.perf_counter() - start
    return kept
