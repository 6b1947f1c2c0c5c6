"""Packs: seconds to write, open and read them, and their bytes; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from paceline.data.decode import decode_compact
from paceline.data.index import Index, Strings
from paceline.data.pack.reader import Pack, PackedSplit
from paceline.data.pack.store import store_of
from paceline.data.pack.writer import PackConfig, write_pack
from paceline.data.whole_set import open_whole_set

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.data.store import Store

REPOSITORY = Path(__file__).resolve().parents[2]
ROUNDS = 7
MILLION, BOXES_EACH = 1_000_000, 7

OPEN = """\
import json, sys, time
import numpy, psutil
from pathlib import Path
from paceline.data.pack.reader import Pack
before, start = psutil.Process().memory_info().rss, time.perf_counter()
index = Pack.open(Path(sys.argv[1])).index("train")
opened_s, rss = time.perf_counter() - start, psutil.Process().memory_info().rss
rows = numpy.random.default_rng(0).integers(0, len(index), 100_000)
start = time.perf_counter()
for row in rows.tolist():
    index.boxes[index.slice(row)]
lookup_us = (time.perf_counter() - start) / len(rows) * 1e6
print(json.dumps({"opened_s": opened_s, "resident_mb": (rss - before) / 1e6, "lookup_us": lookup_us}))
"""


class MadeUp:
    """Stands in for a pack: images of a few bytes."""

    decoded, imgsz, address = False, 0, "made up"

    def read(self, entry: int) -> bytes:
        """Return the number of the image."""
        return entry.to_bytes(8, "little")


def median_s(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Median of several rounds."""
    seconds = []
    for _ in range(ROUNDS):
        start = clock()
        work()
        seconds.append(clock() - start)
    return statistics.median(seconds)


def real(data: Path, folder: Path) -> dict[str, float]:
    """Figures of one data set."""
    whole = open_whole_set(str(data), cache_folder=folder / "cache")
    images = sum(len(index) for index in whole.splits.values())
    found: dict[str, float] = {"images": images}
    files = {path for index in whole.splits.values() for path in map(index.path, range(len(index)))}
    found["files_mb"] = sum(path.stat().st_size for path in files) / 1e6
    for name, config in (("encoded", PackConfig()), ("decoded", PackConfig(decoded=True))):
        out = folder / f"{name}.pack"

        def write(out: Path = out, config: PackConfig = config) -> None:
            write_pack(whole.splits, out, made_from=whole.format, config=config)

        found[f"{name}_write_s"] = median_s(write, time.perf_counter)
        found[f"{name}_mb"] = out.stat().st_size / 1e6
        found[f"{name}_open_ms"] = 1e3 * median_s(lambda out=out: Pack.open(out).index("train"), time.perf_counter)

        found |= {f"{name}_{key}": value for key, value in reading(out).items()}
    train = whole.splits["train"]
    plain = store_of(train)
    found["file_read_us"] = 1e6 / len(train) * median_s(lambda: read_all(plain, len(train)), time.process_time)
    return found


def reading(out: Path) -> dict[str, float]:
    """Processor time per image of the training split of a pack, in microseconds."""
    first = []
    for _ in range(ROUNDS):
        index = Pack.open(out).index("train")
        store = store_of(index)
        start = time.process_time()
        read_all(store, len(index))
        first.append(time.process_time() - start)

    def decode_all() -> None:
        for row in range(len(index)):
            decode_compact(store.read(row), int(index.orientation[row]))

    seconds = {
        "first_read_us": statistics.median(first),
        "later_read_us": median_s(lambda: read_all(store, len(index)), time.process_time),
        "pixels_us": median_s(decode_all, time.process_time),
    }
    return {name: value * 1e6 / len(index) for name, value in seconds.items()}


def read_all(store: Store, number: int) -> None:
    """Read every image, and keep none."""
    for row in range(number):
        store.read(row)


def million(folder: Path) -> dict[str, float]:
    """Figures of the made-up pack."""
    boxes = MILLION * BOXES_EACH
    random = np.random.default_rng(0)
    index = Index(
        names=tuple(f"class {number}" for number in range(80)),
        root=Path("made up"),
        paths=Strings.of(f"images/train/{number:012d}.jpg" for number in range(MILLION)),
        sizes=np.full((MILLION, 2), 640, np.int32),
        orientation=np.ones(MILLION, np.uint8),
        offsets=np.arange(0, boxes + 1, BOXES_EACH),
        boxes=np.sort(random.uniform(0, 640, (boxes, 2, 2)), axis=1).reshape(-1, 4),
        labels=random.integers(0, 80, boxes, np.int32),
        crowd=np.zeros(boxes, np.bool_),
        difficult=np.zeros(boxes, np.bool_),
        area=random.uniform(1, 1e5, boxes),
        image_ids=np.arange(MILLION),
        category_ids=np.arange(80),
        origins=np.arange(MILLION),
        packed=PackedSplit(pack=cast("Pack", MadeUp()), entries=np.arange(MILLION)),
    )
    out = folder / "million.pack"
    start = time.perf_counter()
    write_pack({"train": index}, out, made_from="made up", config=PackConfig())
    found = {"written_s": time.perf_counter() - start, "tables_mb": out.stat().st_size / 1e6}
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", OPEN, str(out)], check=True, capture_output=True).stdout)
        for _ in range(3)
    ]
    return found | {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    shared = REPOSITORY.parent / "shared" / "data"
    parser.add_argument("--data", type=Path, nargs="*", default=[shared / "coco33", shared / "bccd_voc"])
    parser.add_argument("--no-million", action="store_true")
    arguments = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for data in arguments.data:
            results[data.name] = real(data, Path(scratch))
        if not arguments.no_million:
            results["million"] = million(Path(scratch))
    for name, figures in results.items():
        print(name)
        for key, value in figures.items():
            print(f"  {key:<24}{value:>14,.3f}")
    machine = {"machine": platform.machine(), "python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps(machine | results))


if __name__ == "__main__":
    main()
