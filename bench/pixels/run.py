"""What decoding, resizing and colour jitter cost on one core, each way by itself; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import simplejpeg

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "bench" / "bccd"))

from machine import machine  # noqa: E402

from paceline.data import shapes  # noqa: E402
from paceline.data.decode import decode_compact  # noqa: E402
from paceline.native.jitter import jitter_by_kernel, jitter_by_opencv  # noqa: E402
from paceline.native.library import best_level, library  # noqa: E402
from paceline.native.resample import resample, resample_by_opencv  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

LEVELS = ("portable", "sse4", "avx2", "avx512", "vbmi")
HSV = (0.01, 1.3, 0.8)
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def by_opencv(encoded: bytes, reduced: int = 0) -> Pixels:
    """Decode as it was done before: OpenCV, blue first, then turned round."""
    flags = cv2.IMREAD_ANYCOLOR | cv2.IMREAD_IGNORE_ORIENTATION | reduced
    pixels: Pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels) if pixels.ndim == 3 else pixels


def by_opencv_rgb(encoded: bytes) -> Pixels:
    """Decode by OpenCV with red first, and three planes always."""
    pixels: Pixels = cv2.imdecode(
        np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
    )
    return pixels


def by_simplejpeg(encoded: bytes) -> Pixels:
    """Decode as it was done before our own decoder, with the same pixels."""
    is_grey = simplejpeg.decode_jpeg_header(encoded)[2] == "Gray"
    pixels: Pixels = simplejpeg.decode_jpeg(encoded, "GRAY" if is_grey else "RGB")
    return pixels


def by_simplejpeg_roughly(encoded: bytes) -> Pixels:
    """Decode by simplejpeg with its quick transform and upsampling, which change pixels."""
    pixels: Pixels = simplejpeg.decode_jpeg(encoded, "RGB", fastdct=True, fastupsample=True)
    return pixels


def decoders(encoded: list[bytes]) -> dict[str, Callable[[int], object]]:
    """Ways to decode image number i."""
    ways: dict[str, Callable[[int], object]] = {
        "decode by OpenCV": lambda i: by_opencv(encoded[i]),
        "decode by OpenCV, RGB": lambda i: by_opencv_rgb(encoded[i]),
        "decode (ours)": lambda i: decode_compact(encoded[i]),
    }
    if all(image.startswith(b"\xff\xd8") for image in encoded):
        ways |= {
            "decode by simplejpeg": lambda i: by_simplejpeg(encoded[i]),
            "decode by simplejpeg, rough": lambda i: by_simplejpeg_roughly(encoded[i]),
            "decode at 1/2 by OpenCV": lambda i: by_opencv(encoded[i], cv2.IMREAD_REDUCED_GRAYSCALE_2),
            "decode at 1/2 (ours)": lambda i: decode_compact(encoded[i], 1, 2),
        }
    return ways


def drawers(images: list[Pixels], imgsz: int) -> dict[str, Callable[[int], object]]:
    """Ways to draw image number i into a square: resize, and jitter of what came out."""
    squares = [cv2.resize(image, (imgsz, imgsz), interpolation=cv2.INTER_LINEAR) for image in images]
    resized = {2: np.empty((imgsz, imgsz), np.uint8), 3: np.empty((imgsz, imgsz, 3), np.uint8)}
    out = np.empty((imgsz, imgsz, 3), np.uint8)

    ways: dict[str, Callable[[int], object]] = {
        "resize by OpenCV": lambda i: resample_by_opencv(images[i], resized[images[i].ndim]),
        "resize (ours)": lambda i: resample(images[i], resized[images[i].ndim]),
        "jitter by OpenCV": lambda i: jitter_by_opencv(squares[i], HSV, out),
        "jitter by OpenCV, mirrored": lambda i: jitter_by_opencv(squares[i], HSV, out, mirror_x=True),
    }
    kernels = library()
    if kernels is not None:
        for level in range(best_level(kernels) + 1):
            ways[f"jitter by kernel, {LEVELS[level]}"] = lambda i, level=level: jitter_by_kernel(
                kernels, squares[i], HSV, out, level=level
            )
        ways["jitter by kernel, mirrored"] = lambda i: jitter_by_kernel(kernels, squares[i], HSV, out, mirror_x=True)
    return ways


def measure(ways: dict[str, Callable[[int], object]], count: int, rounds: int) -> dict[str, float]:
    """Milliseconds of processor per image of each way: all ways in turn on every image, medians of the rounds."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        sums = dict.fromkeys(ways, 0.0)
        for i in range(count):
            first = (number * count + i) % len(names)  # whoever comes first finds the caches cold
            for name in names[first:] + names[:first]:
                start = time.process_time()
                ways[name](i)
                sums[name] += time.process_time() - start
        for name, seconds in sums.items():
            taken[name].append(seconds / count * 1e3)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}  # the first round warms up


def differences(encoded: list[bytes], imgsz: int) -> dict[str, float]:
    """Mean absolute differences of pixels (0 to 255) between ways that take each other's place."""
    ours = [decode_compact(image) for image in encoded]
    found = {
        "decode (ours) to OpenCV": [
            np.abs(pixels.astype(int) - by_opencv(image)).mean() for pixels, image in zip(ours, encoded, strict=True)
        ]
    }
    if all(image.startswith(b"\xff\xd8") for image in encoded) and all(pixels.ndim == 3 for pixels in ours):
        found["simplejpeg, rough, to exact"] = [
            np.abs(pixels.astype(int) - by_simplejpeg_roughly(image)).mean()
            for pixels, image in zip(ours, encoded, strict=True)
        ]
    kernels = library()
    if kernels is not None:
        rows = []
        for pixels in ours:
            square = cv2.resize(pixels, (imgsz, imgsz), interpolation=cv2.INTER_LINEAR)
            outs = [np.empty((imgsz, imgsz, 3), np.uint8) for _ in range(2)]
            jitter_by_kernel(kernels, square, HSV, outs[0])
            jitter_by_opencv(square, HSV, outs[1])
            rows.append(np.abs(outs[0].astype(int) - outs[1]).mean())
        found["jitter by kernel to OpenCV"] = rows
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def images_of(folder: Path, most: int) -> list[bytes]:
    """Read up to `most` images of a folder, spread over it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        sys.exit(f"{folder} has no images; name a folder that has some with --data.")
    picked = np.unique(np.linspace(0, len(paths) - 1, min(most, len(paths))).astype(int))
    return [paths[number].read_bytes() for number in picked]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, nargs="*", help="folders with images (default: the set `shapes`)")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--images", type=int, default=24, help="at most so many of each folder")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    folders = options.data or [shapes.ensure().parent / "images" / "train"]
    record: dict[str, dict[str, object]] = {}
    result: dict[str, float] = {}
    for folder in folders:
        name = "shapes" if not options.data else folder.resolve().name
        encoded = images_of(folder, options.images)
        pixels = [decode_compact(image) for image in encoded]
        times = measure(decoders(encoded) | drawers(pixels, options.imgsz), len(encoded), options.rounds + 1)
        apart = differences(encoded, options.imgsz)
        height, width = (round(float(np.mean([image.shape[axis] for image in pixels]))) for axis in (0, 1))
        print(f"\n{name}: {len(encoded)} images of about {width} x {height}, drawn at {options.imgsz} px")
        print(f"  {'':34} {'ms':>8} {'images/s':>9}")
        for way, spent in times.items():
            print(f"  {way:34} {spent:8.3f} {1e3 / spent:9.0f}")
        for pair, mean in apart.items():
            print(f"  mean difference, {pair}: {mean:.3f} of 255")
        record[name] = {"images": len(encoded), "imgsz": options.imgsz, "ms": times, "mean_difference": apart}
        result[f"{name}_resize_ratio"] = round(times["resize by OpenCV"] / times["resize (ours)"], 2)
        result[f"{name}_decode_ratio"] = round(times["decode by OpenCV"] / times["decode (ours)"], 2)
        if "decode by simplejpeg" in times:
            result[f"{name}_simplejpeg_ratio"] = round(times["decode by simplejpeg"] / times["decode (ours)"], 2)
        kernel = times.get("jitter by kernel, mirrored")
        if kernel:
            result[f"{name}_jitter_ratio"] = round(times["jitter by OpenCV, mirrored"] / kernel, 2)
            result[f"{name}_jitter_per_s"] = round(1e3 / kernel)
    (REPOSITORY / "bench" / "results").mkdir(exist_ok=True)
    written = {"result": result, "sets": record, "simplejpeg": simplejpeg.__version__, "machine": machine()}
    (REPOSITORY / "bench" / "results" / "pixels.json").write_text(json.dumps(written, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
