"""Milliseconds of the reference's step alone: forward, loss, backward and optimiser on one batch that lies ready.

Usage: DIR/bin/python peer_step.py MODEL(yolo11n) IMGSZ BATCH CLASSES STEPS [device]    prints one line of JSON.
"""

import json
import statistics
import sys
import time

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG

model, imgsz, batch, classes, steps = sys.argv[1], *map(int, sys.argv[2:6])
device = torch.device(sys.argv[6] if len(sys.argv) > 6 else "cpu")
network = DetectionModel(f"{model}.yaml", nc=classes, verbose=False).to(device).train()
network.args = get_cfg(DEFAULT_CFG, {"imgsz": imgsz})
for parameter in network.parameters():
    parameter.requires_grad_(parameter.dtype.is_floating_point)
optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.937, nesterov=True)
torch.manual_seed(0)
boxes = 12
number = batch * boxes
ready = {
    "img": torch.rand(batch, 3, imgsz, imgsz, device=device),
    "batch_idx": torch.arange(batch, device=device).repeat_interleave(boxes).float(),
    "cls": torch.randint(0, classes, (number, 1), device=device).float(),
    "bboxes": torch.cat((torch.rand(number, 2) * 0.8 + 0.1, torch.rand(number, 2) * 0.15 + 0.03), 1).to(device),
}
half = device.type == "cuda"


def step() -> float:
    start = time.perf_counter()
    with torch.autocast(device.type, dtype=torch.float16, enabled=half):
        loss, _ = network(ready)
    optimizer.zero_grad()
    loss.sum().backward()
    torch.nn.utils.clip_grad_norm_(network.parameters(), max_norm=10.0)
    optimizer.step()
    if half:
        torch.cuda.synchronize()
    return time.perf_counter() - start


for _ in range(3):
    step()
times = [step() for _ in range(steps)]
print("RESULT " + json.dumps({"median_s": statistics.median(times), "least_s": min(times), "most_s": max(times)}))
