"""The step alone and the training end to end, for several sizes of a network, predicted beside measured.

    python bench/step/run.py --data FOLDER [--models n s m] [--device auto] [--imgsz 640] [--batch 64] [--seconds 10]

Each size is one `paceline bench` in a process of its own, on the 33 images of coco33 repeated to 4,096 entries. What
is done is merged into one file at once, by device, model, size, batch and versions, and is passed over by the next
call; no size is begun that might not end within `--limit` seconds. So sizes may be measured in several short calls:

    python bench/step/run.py --data FOLDER --models n s          then --models m l, then --models x

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from entries import repeated
from kept import here, key_of, merge, read_results

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "bench" / "results" / "step.json"
SIZES = ("n", "s", "m", "l", "x")
EXPECTED_S = 170.0
"""That a size takes on a GPU with everything to compile and ten seconds per measurement; until one has been seen."""
TO_REACH = {"n": 4500, "s": 2200, "m": 900, "l": 720, "x": 390}
"""Images/s of the step alone that are aimed at on one H200, at 640 px and batch 64."""


def measure(words: list[str], limit_s: float) -> dict[str, Any] | None:
    """Run one bench; returns its record, None where it failed or took too long, which is said."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.json"
        try:
            done = subprocess.run([sys.executable, "-m", "paceline", "bench", *words, f"json={file}"], timeout=limit_s)
        except subprocess.TimeoutExpired:
            print(f"{' '.join(words)}: not done in {limit_s:.0f} s; nothing is kept of it.", flush=True)
            return None
        if done.returncode:
            print(f"{' '.join(words)}: ended with status {done.returncode}.", flush=True)
            return None
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return record


def row_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of the table."""
    step, images = record["step"], record["step"]["images"]
    data = record["data"]
    row = {
        "model": record["model"],
        "limit": 1e3 * images / step["limit_ms"],
        "attainable": 1e3 * images / step["attainable_ms"],
        "step": step["images_per_s"]["median"],
        "end_to_end": data["images_per_s"]["median"] if data else None,
        "loader": data["loader_images_per_s"]["median"] if data else None,
        "plan": record["plan"],
    }
    row["of_attainable"] = row["step"] / row["attainable"]
    row["end_to_end_ratio"] = row["end_to_end"] / row["step"] if data else None
    return row


def print_table(rows: list[dict[str, Any]], *, with_aim: bool) -> None:
    headings = ["limit", "attainable", *(["to reach"] if with_aim else []), "step", "of attainable", "loader"]
    headings += ["end to end", "of step"]
    print(f"{'images/s':10}" + "".join(f"{heading:>14}" for heading in headings) + "  plan")
    for row in rows:
        cells = [f"{row['limit']:,.1f}", f"{row['attainable']:,.1f}"]
        cells += [f"{TO_REACH.get(row['model'].removeprefix('yolo11'), 0):,}"] if with_aim else []
        cells += [f"{row['step']:,.1f}", f"{row['of_attainable']:.0%}"]
        cells += [f"{row['loader']:,.0f}", f"{row['end_to_end']:,.1f}", f"{row['end_to_end_ratio']:.2f}"] * bool(
            row["end_to_end"]
        )
        print(f"{row['model']:10}" + "".join(f"{cell:>14}" for cell in cells) + f"  {row['plan']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of coco33, with instances.json; without, the step alone")
    parser.add_argument("--entries", type=int, default=4096)
    parser.add_argument("--models", nargs="+", help="sizes of yolo11, or names of networks; all sizes, or n on a CPU")
    parser.add_argument("--imgsz", type=int, help="640, or 320 on a CPU")
    parser.add_argument("--batch", type=int, help="64, or 8 on a CPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--limit", type=float, default=540.0, help="seconds that this call may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=REPOSITORY / "build" / "step", help="where the entries are linked")
    parser.add_argument("options", nargs="*", help="further options of `paceline bench`, such as amp=bf16")
    arguments = parser.parse_args()
    start = time.monotonic()
    machine = here(arguments.device)
    data = repeated(arguments.data.resolve(), arguments.entries, arguments.work) if arguments.data else None
    expected_s, left = EXPECTED_S, []
    on_gpu = "CUDA" in machine["versions"]
    imgsz, batch = arguments.imgsz or (640 if on_gpu else 320), arguments.batch or (64 if on_gpu else 8)
    names = [f"yolo11{size}" if size in SIZES else size for size in arguments.models or (SIZES if on_gpu else "n")]
    for name in names:
        key = machine | {"model": name, "imgsz": imgsz, "batch": batch}
        if any(key_of(record) == key for record in read_results(arguments.out)):
            print(f"{name}: done before.", flush=True)
            continue
        rest_s = arguments.limit - (time.monotonic() - start)
        if rest_s < expected_s and name != names[0]:
            left.append(name)
            continue
        words = [f"model={name}", f"imgsz={imgsz}", f"batch={batch}", f"device={arguments.device}"]
        words += ["tune_step=full"] * (on_gpu and not any(word.startswith("tune_step=") for word in arguments.options))
        words += [f"seconds={arguments.seconds}", *([f"data={data}"] if data else []), *arguments.options]
        begun = time.monotonic()
        record = measure(words, max(rest_s, 1.0))
        if record is None:
            left.append(name)
            continue
        expected_s = time.monotonic() - begun
        merge(arguments.out, record)
    asked = machine | {"imgsz": imgsz, "batch": batch}
    chosen = [record for record in read_results(arguments.out) if record["model"] in names]
    rows = [row_of(record) for record in chosen if key_of(record) == asked | {"model": record["model"]}]
    rows.sort(key=lambda row: names.index(row["model"]))
    print_table(rows, with_aim="H200" in machine["device"])
    if left:
        print(f"Still to be measured: {', '.join(left)}; call this again.")
    figures = {row["model"]: {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows}
    print(json.dumps({"device": machine["device"], "left": left, "models": figures}))


if __name__ == "__main__":
    main()
