"""Scanning 200,000 images with their labels, and an index of a million; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import files
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

sys.path.insert(0, str(Path(__file__).parents[1] / "bccd"))
from machine import machine

IMAGES, COLD_IMAGES = 200_000, 10_000
INDEX_IMAGES, INDEX_BOXES = 1_000_000, 7_000_000
ROUNDS = 3
Figures = dict[str, object]


def timed(root: Path, data: str) -> Figures:
    """Open the train split as a training does; return what it cost and found."""
    from paceline.data import skim
    from paceline.data.index_cache import scan_or_load
    from paceline.data.source import recognise

    wall = time.perf_counter()
    source = recognise(str(root / data))
    listing = source.list_files("train")
    listed = time.perf_counter() - wall
    number = len(listing.images)
    del listing
    wall, busy = time.perf_counter(), time.process_time()
    scan = scan_or_load(source, "train")
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    return {
        "wall_s": round(wall, 3),
        "cpu_s": round(busy, 3),
        "listing_s": round(listed, 3),
        "per_s": round(number / wall),
        "per_cpu_s": round(number / busy),
        "compiled_readers": skim.readers() is not None,
        "images": len(scan.index),
        "boxes": len(scan.index.boxes),
        "findings": scan.report.counts,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def step_scan(root: Path) -> Figures:
    """First scan: nothing is stored."""
    shutil.rmtree(root / ".paceline", ignore_errors=True)
    return timed(root, "data.yaml")


def step_plain(root: Path) -> Figures:
    """First scan without the compiled readers."""
    from paceline.data import skim

    skim.readers = lambda: None
    return step_scan(root)


def step_again(root: Path) -> Figures:
    """Second start: the stored index is found, and all files are stamped to see that none has changed."""
    return timed(root, "data.yaml")


def step_touched(root: Path) -> Figures:
    """Start after one file in a hundred was written again."""
    for path in files.all_files(root)[::100]:
        os.utime(path)
    return timed(root, "data.yaml")


def step_floor(root: Path) -> Figures:
    """Floor: one page of each file is read, and not looked at."""
    paths = files.all_files(root)
    rounds = [files.floor(paths) for _ in range(ROUNDS)]
    wall, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
    number = len(paths) // 2
    rates = {"per_s": round(number / wall), "per_cpu_s": round(number / busy)}
    return {"wall_s": round(wall, 3), "cpu_s": round(busy, 3), **rates}


def step_cold(root: Path) -> Figures:
    """Floor and first scan of COLD_IMAGES whose content is not in memory."""
    (root / "cold.yaml").write_text((root / "data.yaml").read_text().replace("train: images", "train: images/000"))
    paths = files.all_files(root)[: 2 * COLD_IMAGES]
    files.evict(paths)
    wall, busy = files.floor(paths)
    files.evict(paths)
    return {"floor_wall_s": round(wall, 3), "floor_cpu_s": round(busy, 3)} | timed(root, "cold.yaml")


def resident() -> dict[str, int]:
    """Memory of this process in MB: all, its own, and mapped pages of files, which the system can take back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.startswith(("VmRSS", "RssAnon", "RssFile")))
    return {name[:-1]: round(int(kilobytes) / 1024) for name, kilobytes, *_ in fields}


def step_save(root: Path) -> Figures:
    """Store an index of a million images."""
    from paceline.data.index import Index, Strings

    random = np.random.default_rng(0)
    counts = random.multinomial(INDEX_BOXES, np.full(INDEX_IMAGES, 1 / INDEX_IMAGES))
    boxes = random.uniform(0, 200, (INDEX_BOXES, 4))
    boxes[:, 2:] += boxes[:, :2] + 1
    index = Index(
        names=tuple(f"class{k}" for k in range(80)),
        root=root,
        paths=Strings.of(f"images/train/{k:012d}.jpg" for k in range(INDEX_IMAGES)),
        sizes=random.integers(400, 641, (INDEX_IMAGES, 2), np.int32),
        orientation=np.ones(INDEX_IMAGES, np.uint8),
        offsets=np.concatenate([[0], np.cumsum(counts)]),
        boxes=boxes,
        labels=random.integers(0, 80, INDEX_BOXES, np.int32),
        crowd=np.zeros(INDEX_BOXES, np.bool_),
        difficult=np.zeros(INDEX_BOXES, np.bool_),
        area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        image_ids=np.arange(INDEX_IMAGES),
        category_ids=np.arange(80),
        origins=np.arange(INDEX_IMAGES),
    )
    seconds = _seconds(lambda: index.save(root / "million.safetensors"))
    return {"save_s": seconds, "file_mb": round((root / "million.safetensors").stat().st_size / 1e6)}


def step_load(root: Path) -> Figures:
    """Load it, look rows up at random, draw the order of an epoch, then divide and count it."""
    from paceline.data.check import summarise
    from paceline.data.dataset import divide
    from paceline.data.draws import permutation
    from paceline.data.index import Index

    figures: Figures = {"rss_before_mb": resident()}
    start = time.perf_counter()
    index, _ = Index.load(root / "million.safetensors", root)
    figures["load_s"] = round(time.perf_counter() - start, 3)
    figures["rss_loaded_mb"] = resident()
    rows = np.random.default_rng(1).integers(0, len(index), 200_000).tolist()
    total = 0
    start = time.perf_counter()
    for row in rows:
        total += len(index.boxes[index.slice(row)])
    figures["lookups_per_s"] = round(len(rows) / (time.perf_counter() - start))
    figures["order_s"] = _seconds(lambda: permutation(0, 1, len(index)))
    float(index.boxes.sum())
    figures["rss_all_boxes_touched_mb"] = resident()
    figures["divide_s"] = _seconds(lambda: divide(index, 0))
    figures["summarise_s"] = _seconds(lambda: summarise("train", index))
    figures["peak_rss_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return figures


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return round(time.perf_counter() - start, 3)


STEPS = {
    step.__name__.removeprefix("step_"): step
    for step in (step_scan, step_plain, step_again, step_touched, step_floor, step_cold, step_save, step_load)
}


def run_step(name: str, root: Path, *, cores: int | None = None) -> Figures:
    """Carry a step out in a process of its own, on `cores` cores (None: all)."""
    command = [sys.executable, __file__, "--step", name, "--folder", str(root)]
    if cores:
        command += ["--cores", str(cores)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    print(f"{name:8} ({cores or 'all'} cores): {figures}", flush=True)
    return figures


def median_of(name: str, root: Path, **settings: object) -> Figures:
    """Repeat a step; return the figures of the round of median wall time, and all rounds' times."""
    rounds = sorted((run_step(name, root, **settings) for _ in range(ROUNDS)), key=lambda figures: figures["wall_s"])
    return rounds[ROUNDS // 2] | {"rounds_wall_s": [figures["wall_s"] for figures in rounds]}


def bench(root: Path, images: int) -> Figures:
    """All steps, in turn."""
    made = _seconds(lambda: files.make(root, images))
    size = sum(os.stat(path).st_size for path in files.all_files(root))
    print(f"{images:,} images and labels, {size / 1e6:,.0f} MB, made in {made} s", flush=True)
    results: Figures = {"images": images, "files_mb": round(size / 1e6), "make_s": made}
    results["floor"] = run_step("floor", root, cores=1)
    results["one_core"] = median_of("scan", root, cores=1)
    results["all_cores"] = median_of("scan", root)
    results["again"] = median_of("again", root, cores=1)
    results["touched"] = run_step("touched", root, cores=1)
    results["without_library"] = run_step("plain", root, cores=1)
    results["cold"] = run_step("cold", root)
    results["million"] = run_step("save", root) | run_step("load", root)
    for name in ("one_core", "all_cores", "without_library"):
        assert results[name]["findings"] == files.planted(images), "the scan did not find what is wrong"
    floor, one = results["floor"]["per_cpu_s"], results["one_core"]
    results["entries_per_cpu_s"] = one["per_cpu_s"]
    results["share_of_floor"] = round(one["per_cpu_s"] / floor, 3)
    results["cores_over_one"] = round(results["all_cores"]["per_s"] / one["per_s"], 2)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--folder", type=Path, help="where the files are made (default: the temporary folder)")
    parser.add_argument("--cores", type=int)
    parser.add_argument("--step", choices=sorted(STEPS))
    arguments = parser.parse_args()
    if arguments.step:
        if arguments.cores:
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
        print(json.dumps(STEPS[arguments.step](arguments.folder)))
        return
    with tempfile.TemporaryDirectory(prefix="paceline-scan-", dir=arguments.folder) as root:
        results = bench(Path(root), arguments.images) | {"machine": machine()}
    out = Path(__file__).parents[1] / "results" / "scan.json"
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
