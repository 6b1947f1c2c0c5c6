"""Files of the bench: a YOLO set of real, distinct image and label files, and the floor of reading them."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import cv2
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PER_FOLDER = 10_000
FAULT_EVERY = 10_000
"""One image in so many is cut off, and one in so many has a label file with a bad line."""
PNG_EVERY = 10
HEAD_BYTES = 4096


def make(root: Path, number: int) -> None:
    """Write `number` images (one in PNG_EVERY a PNG, the others JPEG) with a label file each, and a data.yaml.

    Every file has pixels or boxes of its own; images are 48 to 128 px wide and mostly larger than one page.
    """
    folders = [range(start, min(start + PER_FOLDER, number)) for start in range(0, number, PER_FOLDER)]
    for k in range(len(folders)):
        (root / "images" / f"{k:03d}").mkdir(parents=True)
        (root / "labels" / f"{k:03d}").mkdir(parents=True)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(lambda k: _make_folder(root, k, folders[k]), range(len(folders))))
    (root / "data.yaml").write_text(f"train: images\nnames: [{', '.join(f'class{k}' for k in range(80))}]\n")


def planted(number: int) -> dict[str, int]:
    """Return the findings that `make` has planted."""
    faults = -(-number // FAULT_EVERY)
    return {"image": faults, "line": faults}


def _make_folder(root: Path, folder: int, numbers: range) -> None:
    """Write the images and labels of one folder."""
    random = np.random.default_rng(folder)
    noise = random.integers(0, 256, (512, 512, 3), np.uint8)
    for number in numbers:
        height, width = (int(side) for side in random.integers(48, 129, 2))
        top, left = (int(place) for place in random.integers(0, 512 - 128, 2))
        suffix, options = (".png", []) if number % PNG_EVERY == 0 else (".jpg", [cv2.IMWRITE_JPEG_QUALITY, 80])
        pixels = noise[top : top + height, left : left + width]
        if suffix == ".png":
            pixels = np.ascontiguousarray(pixels[..., 0])
        _, encoded = cv2.imencode(suffix, pixels, options)
        content = encoded.tobytes()
        if number % FAULT_EVERY == 1:
            content = content[: len(content) // 2]
        boxes = random.uniform((0.3, 0.3, 0.01, 0.01), (0.7, 0.7, 0.5, 0.5), (int(random.poisson(7)), 4))
        rows = zip(random.integers(0, 80, len(boxes)).tolist(), boxes.tolist(), strict=True)
        lines = [f"{label} {x:.6f} {y:.6f} {width:.6f} {height:.6f}\n" for label, (x, y, width, height) in rows]
        if number % FAULT_EVERY == 2:
            lines = ["0 0.5 0.5 0.25 0.25\n", "0 0.5 0.5\n"]
        (root / "images" / f"{folder:03d}" / f"{number:07d}{suffix}").write_bytes(content)
        (root / "labels" / f"{folder:03d}" / f"{number:07d}.txt").write_text("".join(lines))


def evict(paths: Sequence[bytes]) -> None:
    """Ask the system to forget what it holds of these files, so that they are read from the disk again."""
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def floor(paths: Sequence[bytes]) -> tuple[float, float]:
    """Open, read one page of and close each of `paths`; return wall and processor seconds."""
    wall, busy = time.perf_counter(), time.process_time()
    opened, read, close = os.open, os.read, os.close
    for path in paths:
        descriptor = opened(path, os.O_RDONLY)
        read(descriptor, HEAD_BYTES)
        close(descriptor)
    return time.perf_counter() - wall, time.process_time() - busy


def all_files(root: Path) -> list[bytes]:
    """Paths of all images and labels, image and label in turn as a scan reads them."""
    images = sorted(os.fsencode(path) for path in (root / "images").glob("*/*"))
    labels = sorted(os.fsencode(path) for path in (root / "labels").glob("*/*"))
    return [path for pair in zip(images, labels, strict=True) for path in pair]
