"""Suppression on a CPU, compiled and by tensor operations, in turn on the same boxes; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import torch

from paceline.evaluation.nms import Kept, batched_nms
from paceline.native.suppression import SUPPRESSION

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine  # noqa: E402

IMAGES, BOXES, CLASSES, SIDE_PX = 16, 6300, 3, 320.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if SUPPRESSION.get() is None:
        sys.exit("The kernel was not built; install a C compiler and install Paceline again.")
    random = torch.Generator().manual_seed(0)
    centre = torch.rand(IMAGES, BOXES, 2, generator=random) * SIDE_PX
    half = torch.rand(IMAGES, BOXES, 2, generator=random) * 40 + 4
    boxes = torch.cat((centre - half, centre + half), dim=-1)
    scores = torch.rand(IMAGES, BOXES, generator=random) * 0.02
    labels = torch.randint(0, CLASSES, (IMAGES, BOXES), generator=random)

    def timed() -> tuple[float, Kept]:
        start = time.perf_counter()
        kept = batched_nms(boxes, scores, labels, scores >= 0, iou=0.7, max_det=300)
        return 1000 * (time.perf_counter() - start) / IMAGES, kept

    found: dict[str, list[float]] = {"compiled": [], "by_torch": []}
    for _ in range(options.rounds):
        milliseconds, compiled = timed()
        found["compiled"].append(milliseconds)
        with mock.patch.object(SUPPRESSION, "get", return_value=None):
            milliseconds, by_torch = timed()
        found["by_torch"].append(milliseconds)
        assert torch.equal(compiled.indices, by_torch.indices), "both have to keep the same boxes"
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, values in found.items():
        print(f"{name:9} {medians[name]:7.2f} ms an image ({min(values):.2f} to {max(values):.2f})")
    result = {f"{name}_ms": round(value, 2) for name, value in medians.items()}
    result["ratio"] = round(medians["by_torch"] / medians["compiled"], 1)
    record = result | {"images": IMAGES, "boxes": BOXES, "machine": machine()}
    (REPOSITORY / "bench" / "results" / "suppress.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
