"""What Python costs many threads that feed a GPU: decoding and copying are slept through, so no cores are needed.

    python bench/render/crowd.py [--threads 4 8 16] [--decode-ms 2] [--gigabytes 4] [--consumer-ms 6] [--rounds 3]

Batches of 64 are packed for a device that draws them, from 3,072 files of 640 x 480 px, of which .9 are decoded for
each picture (partners from windows). A decode takes as long as told and a copy so many bytes a second, both without
Python's lock, as in compiled code; the consumer sleeps for each batch. Beside what is reached is what threads could do
if Python took no time, and the processor time that it took. Files are read. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))
from gpu import HEIGHT, WIDTH, make_set
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.rectangles import ROW_BYTES, ROWS
from paceline.data.loader import TrainLoader
from paceline.data.store import FileStore
from paceline.native.jpeg import decoder

BATCH, IMGSZ, EPOCHS = 64, 640, 2


def measured(data: Path, threads: int, options: argparse.Namespace) -> dict[str, float]:
    """Take some epochs, after one that fills the window."""
    blank, copied, of_thread, library = np.zeros((HEIGHT, WIDTH, 3), np.uint8), [0.0], threading.local(), decoder()
    assert library is not None, "build the compiled parts first"

    def read_and_sleep(store: FileStore, number: int, *_: Any) -> Any:
        file, shape = of_thread.__dict__.setdefault("file", np.empty(1 << 20, np.uint8)), (ctypes.c_int32 * 3)()
        path = os.fsencode(store._path(number))  # no room for pixels: it is read, and not decoded
        library.paceline_jpeg_load(path, file.ctypes.data, file.size, file.ctypes.data, 0, 1, shape, 0)
        time.sleep(options.decode_ms / 1e3)
        return blank

    def copy(rectangles: Any) -> None:
        num_bytes = float((rectangles[:, ROW_BYTES] * rectangles[:, ROWS]).sum())
        copied[0] += num_bytes
        time.sleep(num_bytes / (1e9 * options.gigabytes))

    def draw(*_: Any) -> torch.Tensor:
        time.sleep(options.consumer_ms / 1e3)
        return torch.empty(BATCH, 3, 1, 1)

    config = DataConfig(data=str(data), imgsz=IMGSZ, batch=BATCH, workers=threads, cache="none")
    index = open_data_set(config, seed=0, splits=("train",)).train
    assert index is not None
    with (
        mock.patch.object(FileStore, "load", read_and_sleep),
        mock.patch("paceline.data.device.pack.copy_rectangles", copy),
        TrainLoader(index, config, AugmentConfig(partners="window"), seed=0, on_device=True) as loader,
    ):
        drawn = DeviceLoader(loader, torch.device("cpu"), torch.bfloat16, draw)
        for _ in drawn.epoch(0, mosaic=True):
            pass
        before, cpu_s, start, count = loader.stats()["cache_hits"], time.process_time(), time.perf_counter(), 0
        copied[0] = 0.0
        for epoch in range(1, 1 + EPOCHS):
            with closing(drawn.epoch(epoch, mosaic=True)) as batches:
                count += sum(len(batch) for batch in batches)
        elapsed, cpu_s = time.perf_counter() - start, time.process_time() - cpu_s
        decodes = 4 - (loader.stats()["cache_hits"] - before) / count
    busy_s = decodes * options.decode_ms / 1e3 + copied[0] / count / (1e9 * options.gigabytes)
    possible = min(threads / busy_s, 1e3 * BATCH / options.consumer_ms)
    return {"images_per_s": count / elapsed, "possible": possible, "python_us": 1e6 * cpu_s / count}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--decode-ms", type=float, default=2.0)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="that a copy takes a second, 10^9 bytes")
    parser.add_argument("--consumer-ms", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_set(Path(folder))
        for threads in options.threads:
            found = [measured(data, threads, options) for _ in range(options.rounds)]
            rows[str(threads)] = {name: statistics.median(row[name] for row in found) for name in found[0]}
            told = ", ".join(f"{name} {value:,.0f}" for name, value in rows[str(threads)].items())
            print(f"{threads} threads: {told}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
