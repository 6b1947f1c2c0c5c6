"""Images per second of our training loader on one set, in one way; a process of its own, as the reference's is.

Usage: python ours.py data.yaml IMGSZ host|packed encoded|decoded THREADS EPOCHS
Prints one line of JSON: images, wall and processor seconds of each epoch, decodes for each image delivered, memory.

`packed` is the host's share where a device draws: everything but the drawing, up to the buffer that would be sent.
"""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

import paceline.data.loader
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.loader import DeviceLoader
from paceline.data.loader import TrainLoader

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 16
LEAST_IMAGES = 1200
"""From encoded bytes each image is to be decoded once per pass; a small set would be remembered from the last pass."""


def main() -> None:
    torch.set_num_threads(1)
    data, imgsz, way, source, threads, epochs = (*sys.argv[1:5], int(sys.argv[5]), int(sys.argv[6]))
    encoded = source == "encoded"
    cache = "none" if encoded else "ram"
    config = DataConfig(data=data, imgsz=int(imgsz), batch=BATCH, workers=threads, cache=cache)  # type: ignore[arg-type]
    index = open_data_set(config, seed=0, splits=("train",)).train
    assert index is not None
    if encoded:
        index = index.select_images(np.tile(np.arange(len(index)), -(-LEAST_IMAGES // len(index))))
        paceline.data.loader.PARTNER_WINDOW = 1  # 64 images over all stripes, far fewer than the set has
    augment = AugmentConfig(partners="window" if encoded else "all")
    nothing = torch.zeros(BATCH, 3, 1, 1)

    def draw_nothing(sources: Tensor, masks: Tensor, table: object, size: int, dtype: torch.dtype) -> Tensor:
        return nothing

    memory, results, decodes = [], [], 0.0
    with TrainLoader(index, config, augment, 0, on_device=way == "packed") as loader:
        batches = loader if way == "host" else DeviceLoader(loader, torch.device("cpu"), torch.float32, draw_nothing)
        for epoch in range(epochs + 1):
            before = loader.stats()["decodes"]
            wall, busy, images = time.perf_counter(), time.process_time(), 0
            for batch in batches.epoch(epoch, mosaic=True):
                images += len(batch)
            if epoch:  # the first one warms up
                results.append((images, time.perf_counter() - wall, time.process_time() - busy))
                decodes += loader.stats()["decodes"] - before
            memory.append(psutil.Process().memory_info().rss)
    figures = {
        "epochs": results,
        "decodes_per_image": decodes / sum(images for images, _, _ in results),
        "rss_bytes": memory,
    }
    print("RESULT " + json.dumps(figures))


if __name__ == "__main__":
    main()
