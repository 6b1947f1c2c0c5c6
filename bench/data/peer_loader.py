"""Images per second of the reference's training loader, full augmentation; run by its own environment.

Usage: python peer_loader.py data.yaml IMGSZ none|ram EPOCHS     prints one JSON line: seconds and images of each epoch.
"""

from __future__ import annotations

import json
import sys
import time

import cv2
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import DEFAULT_CFG

BATCH = 16


def main() -> None:
    data, imgsz, cache, epochs = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    config = get_cfg(DEFAULT_CFG, {"imgsz": imgsz, "cache": False if cache == "none" else cache, "mode": "train"})
    info = check_det_dataset(data)
    dataset = build_yolo_dataset(config, info["train"], BATCH, info, mode="train", rect=False, stride=32)
    loader = build_dataloader(dataset, BATCH, 0, shuffle=True, rank=-1)
    rates = []
    for epoch in range(epochs + 1):
        wall, busy, images = time.perf_counter(), time.process_time(), 0
        for batch in loader:
            images += batch["img"].shape[0]
        if epoch:  # the first one warms up
            rates.append((images, time.perf_counter() - wall, time.process_time() - busy))
    print("RESULT " + json.dumps(rates))


if __name__ == "__main__":
    main()
