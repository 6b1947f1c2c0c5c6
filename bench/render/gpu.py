"""Drawing on a GPU: is it right, how fast is the kernel, how fast are images ready on the device, who decodes faster.

    python bench/render/gpu.py [--seconds 3] [--batch 64] [--imgsz 640]

Takes about half a minute and prints a table and, as its last line, the same figures as JSON. Without a GPU it ends with
exit code 2. The images are made here: JPEG files of 640 x 480 px, noise over waves, about as large as COCO's; 64 of
them under 3,072 names, more than a window of mosaic partners holds. Caches are filled with 512.

`encoded_by_host` and `encoded_by_device` say who decodes where nobody keeps decoded images: images per second that are
ready on the device, decodes per image, and the share of the machine's cores that the process takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch

from paceline.data import augment
from paceline.data.config import AugmentConfig, DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.device.codec import NvImageCodec
from paceline.data.device.decode import BatchDecoder, batches
from paceline.data.device.loader import DeviceLoader
from paceline.data.device.pack import Sources, packed
from paceline.data.device.reference import render_reference
from paceline.data.loader import TrainLoader
from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.data.device.feeder import Renderer
    from paceline.data.device.pack import PackedBatch

NUM_IMAGES, NUM_FILES, HEIGHT, WIDTH = 64, 3072, 480, 640
CACHED_SHARE = 1 / 6
NUM_PACKS, NUM_LAUNCHES = 4, 40


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--imgsz", type=int, default=640)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("This bench needs a CUDA GPU.", file=sys.stderr)
        return 2
    from paceline.data.device.kernel import render_by_kernel

    device = torch.device("cuda")
    figures: dict[str, float | str] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cores": len(os.sched_getaffinity(0)),
        "batch": options.batch,
        "imgsz": options.imgsz,
    }
    for name, degrees in (("aligned", 0.0), ("turned", 10.0)):
        packs = [make_pack(options.batch, options.imgsz, degrees, seed) for seed in range(NUM_PACKS)]
        figures[f"{name}_pixels_beyond_1_of_255"] = share_apart(packs[0], render_by_kernel, device)
        figures[f"{name}_kernel_images_per_s"] = kernel_rate(packs, render_by_kernel, device)
        figures[f"{name}_pack_bytes_per_image"] = packs[0].used / options.batch
    with tempfile.TemporaryDirectory() as folder:
        data = make_set(Path(folder))
        for way in ("encoded_by_host", "encoded_by_device", "ram", "device"):
            found = ready_rates(data, way, options, render_by_kernel, device)
            print(found, flush=True)  # a session may be cut off
            figures |= found
        figures |= fill_rates(data, options, render_by_kernel, device)
    for name, figure in figures.items():
        print(f"{name:36} {figure:>14,.6g}" if isinstance(figure, float) else f"{name:36} {figure:>14}")
    print(json.dumps(figures))
    return 0


@cache
def make_image(seed: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    waves = [128 + 90 * np.sin(x / rng.uniform(15, 60) + shift) * np.cos(y / rng.uniform(15, 60)) for shift in range(3)]
    return np.clip(np.stack(waves, -1) + rng.normal(0, 12, (HEIGHT, WIDTH, 1)), 0, 255).astype(np.uint8)


def make_set(folder: Path) -> Path:
    """Write a YOLO data set of one box per image."""
    for name in ("images/train", "labels/train"):
        (folder / name).mkdir(parents=True)
    for number in range(NUM_FILES):
        path, first = (folder / f"images/train/{of:04d}.jpg" for of in (number, number % NUM_IMAGES))
        if path == first:
            cv2.imwrite(str(path), make_image(number), [cv2.IMWRITE_JPEG_QUALITY, 90])
        else:
            path.hardlink_to(first)
        (folder / f"labels/train/{number:04d}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    (folder / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [thing]\n")
    return folder / "data.yaml"


def make_pack(batch: int, size: int, degrees: float, seed: int) -> PackedBatch:
    """Pack mosaics of 16 images under the full augmentation."""
    sources = [make_image(number) for number in range(16)]
    samples = np.arange(batch) % 16
    draws = augment.draw(seed, np.full(batch, seed), np.arange(batch))
    config = AugmentConfig(degrees=degrees)
    partners = augment.partners_of_all(augment.partner_draws(config, draws), 16)
    images = np.concatenate([samples[:, None], partners], axis=1)
    sizes = np.broadcast_to(np.array([HEIGHT, WIDTH]), (*images.shape, 2))
    transforms = augment.plan(config, size, draws, images, sizes, np.ones_like(images), mosaic=True)
    rows = [[sources[number] if number >= 0 else None for number in row] for row in transforms.sources.tolist()]
    targets = {
        "boxes": np.zeros((batch, 32, 4), np.float32),
        "labels": np.zeros((batch, 32), np.int64),
        "valid": np.zeros((batch, 32), np.bool_),
        "samples": samples,
        "original_hw": np.ones((batch, 2), np.int64),
    }
    return packed(transforms, Sources.of(rows), targets, lambda count: np.empty(count, np.uint8))


def share_apart(pack: PackedBatch, kernel: Renderer, device: torch.device) -> float:
    """Share of the values that differ by more than 1/255 from the reference, both on the GPU in float32."""
    memory = torch.from_numpy(pack.buffer)[: pack.used].to(device)
    table, _ = pack.opened(memory)
    drawn = kernel(memory, memory, table, pack.size, torch.float32)
    expected = render_reference(memory, memory, table, pack.size, torch.float32)
    assert bool(torch.isfinite(drawn).all())
    return float(((drawn - expected).abs() > 1 / 255).double().mean())


def kernel_rate(packs: list[PackedBatch], kernel: Renderer, device: torch.device) -> float:
    """Images per second of the kernel alone, in bfloat16, over several packs in turn; the median launch counts."""
    opened = []
    for pack in packs:
        memory = torch.from_numpy(pack.buffer)[: pack.used].to(device)
        opened.append((memory, pack.opened(memory)[0]))
    times = []
    for launch in range(NUM_LAUNCHES + 5):
        memory, table = opened[launch % len(opened)]
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        kernel(memory, memory, table, packs[0].size, torch.bfloat16)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return len(packs[0]) / statistics.median(times[5:])


def ready_rates(
    data: Path, way: str, options: argparse.Namespace, kernel: Renderer, device: torch.device
) -> dict[str, float | str]:
    """Images per second that are ready on the device, with all cores as threads, and what they cost the host.

    Each pass over the set begins where the last one ended, so nothing but a window is decoded already.
    """
    cores = len(os.sched_getaffinity(0))
    is_encoded = way.startswith("encoded")
    config = DataConfig(
        data=str(data),
        imgsz=options.imgsz,
        batch=options.batch,
        workers=cores,
        cache="none" if is_encoded else way,  # type: ignore[arg-type]
        fraction=1.0 if is_encoded else CACHED_SHARE,
    )
    index = open_data_set(config, seed=0, splits=("train",)).train
    augment = AugmentConfig(partners="window" if is_encoded else "all")  # as for a set that no cache could hold
    with TrainLoader(index, config, augment, seed=0, on_device=True) as loader:
        try:
            codec = NvImageCodec(device, cores) if way == "encoded_by_device" else None
        except UserError as error:
            print(error, file=sys.stderr)
            return {}
        drawn = DeviceLoader(loader, device, torch.bfloat16, kernel, upload=way == "device", codec=codec)
        for _ in drawn.epoch(0, mosaic=True):
            pass
        torch.cuda.synchronize()
        count, epoch, before = 0, 1, loader.stats()
        cpu_s, start = time.process_time(), time.perf_counter()
        while time.perf_counter() - start < options.seconds:
            with closing(drawn.epoch(epoch, mosaic=True)) as batches:
                count += sum(len(batch) for batch in batches)
            epoch += 1
        torch.cuda.synchronize()
        elapsed, cpu_s, after = time.perf_counter() - start, time.process_time() - cpu_s, loader.stats()
        return {
            f"{way}_ready_images_per_s": count / elapsed,
            f"{way}_decodes_per_image": (after["decodes"] - before["decodes"]) / count,
            f"{way}_host_cpu_share": cpu_s / elapsed / cores,
            f"{way}_pack_s_per_1000": (after["render_s"] - before["render_s"]) / count * 1000,
        }


def fill_rates(
    data: Path, options: argparse.Namespace, kernel: Renderer, device: torch.device
) -> dict[str, float | str]:
    """Images per second at which cache=device is filled from files, by each decoder, up to its first batch.

    Each is done twice, and the second time counts: files are in the system's cache then, libraries are loaded.
    """
    config = DataConfig(
        data=str(data),
        imgsz=options.imgsz,
        batch=options.batch,
        workers=len(os.sched_getaffinity(0)),
        cache="device",
        fraction=CACHED_SHARE,
    )
    index = open_data_set(config, seed=0, splits=("train",)).train
    figures: dict[str, float | str] = {}
    for decoder in ("host", "device"):
        for _ in range(2):
            with TrainLoader(index, config, AugmentConfig(), seed=0, on_device=True) as loader:
                try:
                    codec = NvImageCodec(device, loader.num_threads) if decoder == "device" else None
                except UserError as error:
                    print(error, file=sys.stderr)
                    return figures
                torch.cuda.synchronize()
                start = time.perf_counter()
                drawn = DeviceLoader(loader, device, torch.bfloat16, kernel, upload=True, codec=codec)
                with closing(drawn.epoch(0, mosaic=True)) as drawing:
                    next(drawing)
                torch.cuda.synchronize()
                figures[f"{decoder}_decodes_and_fills_images_per_s"] = len(index) / (time.perf_counter() - start)
                if codec is not None:
                    figures |= codec_rates(loader, codec, device)
    return figures


def codec_rates(loader: TrainLoader, codec: NvImageCodec, device: torch.device) -> dict[str, float | str]:
    """Images per second of both decoders, from bytes in memory to pixels on the device, each over the whole set."""
    files = {number: loader.images.encoded(number) for number in range(len(loader.index))}
    parts = batches(np.arange(len(files)), loader.index.sizes)
    figures: dict[str, float | str] = {}
    with ThreadPoolExecutor(loader.num_threads) as pool:
        decoder = BatchDecoder(loader, codec, device, pool)

        def by_device(part: list[int]) -> None:
            decoder.decode(part, [files[number] for number in part])

        def by_host(part: list[int]) -> None:
            for pixels in pool.map(lambda number: loader.images.decoded(number, files[number]), part):
                torch.from_numpy(pixels).to(device)

        for name, work in (("host", by_host), ("device", by_device)):
            work(parts[0])
            torch.cuda.synchronize()
            start = time.perf_counter()
            for part in parts:
                work(part)
            torch.cuda.synchronize()
            figures[f"{name}_decode_images_per_s"] = len(files) / (time.perf_counter() - start)
    return figures


if __name__ == "__main__":
    sys.exit(main())
