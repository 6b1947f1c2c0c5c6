"""AP of yolo11n from scratch on BCCD, three seeds, as it trains by default and eagerly in float32; ends with JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from machine import machine, run_on

from paceline.commands.val import validate
from paceline.options import ValOptions

REPOSITORY = Path(__file__).resolve().parents[2]
SPLITS = ("val", "test")
KINDS: dict[str, list[str]] = {"default": [], "float32": ["amp=off", "tune_step=off"]}
SCORES = ("val_ap", "val_ap50", "test_ap", "test_ap50")


def train(options: argparse.Namespace, kind: str, seed: int, cores: SimpleQueue[int]) -> Path:
    """Train on the next free core, with one thread; a finished run is reused. Returns its folder."""
    folder = Path(options.runs) / f"{kind}{seed}"
    if not (folder / "DONE").exists():
        core = cores.get()
        command = [
            sys.executable, "-m", "paceline", "train", f"data={options.data}", "model=yolo11n", "imgsz=320", "batch=16",
            f"epochs={options.epochs}", f"seed={seed}", "device=cpu", "plots=False", f"project={options.runs}",
            f"name={kind}{seed}", "exist_ok=True", *KINDS[kind],
        ]  # fmt: skip
        run_on(core, command)
        cores.put(core)
    return folder


def score(folder: Path, data: Path) -> dict[str, float]:
    """Score the best weights of a run on each split."""
    scores: dict[str, float] = {}
    for split in SPLITS:
        flat = {"model": str(folder), "data": str(data), "split": split, "plots": False, "project": str(folder.parent),
                "name": f"{folder.name}_{split}", "exist_ok": True}  # fmt: skip
        record = validate(ValOptions.from_flat(flat)).record
        scores |= {f"{split}_ap": record.ap, f"{split}_ap50": record.ap50}
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=REPOSITORY / "runs" / "bccd", help="finished runs are reused")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)
    jobs = [(kind, seed) for seed in range(options.seeds) for kind in KINDS]
    with ThreadPoolExecutor(cores.qsize()) as pool:
        folders = [*pool.map(lambda job: train(options, *job, cores), jobs)]
    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    print("run           val AP  val AP50   test AP test AP50")
    for (kind, seed), folder in zip(jobs, folders, strict=True):
        scores = score(folder, options.data)
        runs[kind].append(scores)
        print(f"{kind:8} {seed:2}  " + " ".join(f"{scores[key]:9.4f}" for key in SCORES))
    means = {kind: {key: statistics.fmean(row[key] for row in rows) for key in SCORES} for kind, rows in runs.items()}
    result = {key: round(value, 4) for key, value in means["default"].items()}
    for split in SPLITS:
        key = f"{split}_ap"
        result[f"{key}_minus_float32"] = round(means["default"][key] - means["float32"][key], 4)
        spreads = [statistics.stdev(row[key] for row in rows) for rows in runs.values()] if options.seeds > 1 else [0.0]
        result[f"{key}_spread_of_seeds"] = round(statistics.fmean(spreads), 4)
    record = result | {"runs": runs, "epochs": options.epochs, "seeds": options.seeds, "machine": machine()}
    (REPOSITORY / "bench" / "results").mkdir(exist_ok=True)
    (REPOSITORY / "bench" / "results" / "bccd_accuracy.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
