"""AP with mosaic partners from a window of each stripe against partners from the whole set; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine, run_on  # noqa: E402

KINDS = ("all", "window")


def train(data: Path, kind: str, seed: int, core: int, out: Path, options: argparse.Namespace) -> dict[str, float]:
    """Train on one core; returns APs, and how many images were decoded for each that was delivered.

    The best AP is that of one epoch of many, and swings with luck; the mean of the last third swings less.
    """
    command = [
        sys.executable, "-m", "paceline", "train", f"data={data}", "model=yolo11n", f"imgsz={options.imgsz}",
        "batch=16", f"epochs={options.epochs}", f"seed={seed}", f"partners={kind}", "plots=False", "close_mosaic=2",
        "device=cpu", f"project={out}", f"name={kind}{seed}", "nbs=16",
        # With windows the set is treated as a large one: nothing is kept but what the windows need.
        f"cache={'none' if kind == 'window' else 'ram'}",
    ]  # fmt: skip
    run_on(core, command)
    lines = [json.loads(line) for line in (out / f"{kind}{seed}" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    aps = [line["evaluation"]["ap"] for line in epochs]
    return {
        "ap": max(aps),
        "late_ap": statistics.fmean(aps[-max(len(aps) // 3, 1) :]),
        "decodes_per_image": sum(line["background_s"]["decodes"] for line in epochs)
        / sum(line["images"] for line in epochs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "deeppcb_yolo")
    parser.add_argument("--imgsz", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of DeepPCB with --data.")
    cores = sorted(os.sched_getaffinity(0))
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            with ThreadPoolExecutor(2) as pool:  # both kinds beside each other, so that both see the same load
                runs = [
                    pool.submit(train, options.data, kind, seed, cores[place % len(cores)], Path(folder), options)
                    for place, kind in enumerate(KINDS)
                ]
                for kind, run in zip(KINDS, runs, strict=True):
                    results[kind].append(run.result())
                    print(f"{kind:7} seed {seed}: AP {results[kind][-1]['ap']:.4f}", flush=True)
            result = write(results, options)  # after every seed: runs are long, and what was measured is kept
    print(json.dumps(result))


def write(results: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> dict[str, float]:
    """Write what is known after some seeds; returns the comparison."""
    aps = {kind: [round(run["ap"], 4) for run in runs] for kind, runs in results.items()}
    late = {kind: [round(run["late_ap"], 4) for run in runs] for kind, runs in results.items()}
    means = {kind: statistics.fmean(values) for kind, values in aps.items()}
    done = len(aps["all"])
    spreads = {kind: statistics.stdev(values) if done > 1 else 0.0 for kind, values in aps.items()}
    differences = [window - whole for window, whole in zip(late["window"], late["all"], strict=True)]
    late_spread = statistics.stdev(differences) if done > 1 else 0.0
    result = {
        "ap_window_minus_all": round(means["window"] - means["all"], 4),
        "standard_error_of_difference": round(math.hypot(*spreads.values()) / math.sqrt(done), 4),
        "late_ap_window_minus_all": round(statistics.fmean(differences), 4),
        "standard_error_of_late_difference": round(late_spread / math.sqrt(done), 4),
        "ap_all": round(means["all"], 4),
        "ap_window": round(means["window"], 4),
        "ap_spread_of_seeds": round(statistics.fmean(spreads.values()), 4),
        "decodes_per_image_window": round(statistics.fmean(run["decodes_per_image"] for run in results["window"]), 4),
    }
    settings = {"imgsz": options.imgsz, "epochs": options.epochs, "seeds": done, "images": 1000}
    settings["first_seed"] = options.first_seed
    file = REPOSITORY / "bench" / "results" / "windows.json"
    file.write_text(
        json.dumps(result | {"aps": aps, "late_aps": late, "settings": settings, "machine": machine()}, indent=1) + "\n"
    )
    return result


if __name__ == "__main__":
    main()
