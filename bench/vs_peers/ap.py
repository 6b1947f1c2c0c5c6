"""Full runs of both trainers on BCCD: seconds until AP50-95 by COCO's rules reaches targets, and the final AP.

The two take turns, an epoch each, and the clock of the one that waits stands still: so whatever else the machine does
meets both alike. Runs are kept in bench/results and reused for equal machine, versions and task. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from contest import PEER_VERSION, REPOSITORY, Contender, Task, peer_python
from layout import NAMES, to_yolo

from paceline.commands.evaluation import ground_truth_of
from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set
from paceline.evaluation.coco_ap import coco_figures
from paceline.evaluation.table import DetectionTable

sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine

RESULT = REPOSITORY / "bench" / "results" / "vs_peers_ap.json"
TARGETS = (0.30, 0.35, 0.40, 0.45)
ASKED = 0.45
NEAR = 0.04
"""What the reference reports of itself may be this far from the AP by COCO's rules."""


class Judge:
    """Scores detections that the reference saved, by COCO's rules."""

    def __init__(self, data: Path) -> None:
        index = open_data_set(DataConfig(data=str(data)), seed=0).val
        assert index is not None
        self._rows = {Path(index.paths[row]).stem: row for row in range(len(index))}
        self._ground_truth = ground_truth_of(index)
        self._labels = np.array([index.names.index(name) for name in NAMES])  # ours may stand in another order

    def ap(self, file: Path) -> float:
        """AP50-95 of a file of detections, whose classes are numbered from 1."""
        found = sorted(json.loads(file.read_text()), key=lambda entry: -entry["score"])
        corners = np.array([entry["bbox"] for entry in found], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        table = DetectionTable(
            seen=np.arange(len(self._rows)),
            images=np.array([self._rows[entry["image_id"]] for entry in found], np.int64),
            boxes=corners,
            scores=np.array([entry["score"] for entry in found]),
            labels=self._labels[[entry["category_id"] - 1 for entry in found]],
        )
        return float(coco_figures(self._ground_truth, table.sorted_by_image()).summary[0])


def curve(run: Contender) -> list[dict[str, float]]:
    """Epochs with their seconds since the start of the process, less those in a stand-in, and the AP that was told."""
    return [
        {"epoch": event["epoch"], "seconds": event["time"] - event["standin_s"], "standin_s": event["standin_s"],
         "ap": event["ap"]}
        for event in run.events
        if event["kind"] == "epoch"
    ]  # fmt: skip


def score_theirs(epochs: list[dict[str, float]], run: Contender, python: Path, task: Task, judge: Judge) -> float:
    """Put the AP by COCO's rules in the place of what was told, where it can matter; returns that of the best weights.

    The epoch after the last has no weights of its own: the reference reports its best weights once more at the end.
    """
    weights, out = run.out / "run" / "weights", run.out / "detections"
    script = REPOSITORY / "bench" / "peer" / "peer_detect.py"

    def score(stems: list[str]) -> list[float]:
        files = [str(weights / f"{stem}.pt") for stem in stems]
        command = [str(python), str(script), str(task.data_yaml), str(task.imgsz), str(task.batch), str(out), *files]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return [judge.ap(out / f"{stem}.json") for stem in stems]

    best = max(epoch["ap"] for epoch in epochs)
    for target in TARGETS:
        for epoch in epochs:
            if epoch["ap"] < min(target, best) - NEAR or "told" in epoch:
                continue
            (ap,) = score([f"epoch{int(epoch['epoch']) - 1}"])
            epoch["told"], epoch["ap"] = epoch["ap"], ap
            if ap >= target:
                break
    return score(["best"])[0]


def seconds_to(epochs: list[dict[str, float]], target: float) -> float | None:
    """Seconds until an epoch is evaluated at this AP or more; None where none is."""
    return next((epoch["seconds"] for epoch in epochs if epoch["ap"] >= target), None)


def kept(key: dict[str, Any]) -> dict[str, Any] | None:
    """Find a run of the same machine, versions and task."""
    runs = json.loads(RESULT.read_text())["runs"] if RESULT.exists() else []
    return next((run for run in runs if run["key"] == key), None)


def keys(task: Task) -> dict[str, dict[str, Any]]:
    """Say what has to be equal for a run to be reused."""
    here = machine()
    here.pop("load_average")
    code = subprocess.run(
        ["git", "rev-parse", "HEAD:src"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    ).stdout.strip()
    common = {"machine": here, "imgsz": task.imgsz, "batch": task.batch, "epochs": task.epochs, "seed": task.seed}
    return {
        "ours": common | {"trainer": "paceline", "code": code},
        "theirs": common | {"trainer": f"ultralytics {PEER_VERSION}"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--peer", type=Path, default=REPOSITORY / "build" / "peer", help="environment of the reference")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    python = peer_python(options.peer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data_yaml = to_yolo(options.data, folder / "yolo")
        images = len(list((data_yaml.parent / "images" / "train").iterdir()))
        task = Task(data=options.data, data_yaml=data_yaml, images=images, epochs=options.epochs, seed=options.seed)
        key = keys(task)
        runs = {name: kept(key[name]) for name in key}
        started = {
            name: Contender(
                task.ours(folder / name) if name == "ours" else task.theirs(python, folder / name, "save_period=1"),
                folder / name,
            )
            for name, run in runs.items()
            if run is None
        }
        try:
            while any(not run.is_done for run in started.values()):
                for contender in started.values():
                    if not contender.is_done:
                        contender.go_on(1)
        finally:
            for contender in started.values():
                contender.stop()
        for name, contender in started.items():
            epochs = curve(contender)
            if name == "ours":
                final = max(epoch["ap"] for epoch in epochs)
            else:
                epochs = epochs[: task.epochs]
                final = score_theirs(epochs, contender, python, task, Judge(options.data))
            runs[name] = {"key": key[name], "final_ap": final, "seconds": contender.active_s, "epochs": epochs}
    ours, theirs = (runs[name] or {} for name in ("ours", "theirs"))
    print(f"{'AP50-95':>8} {'ours, s':>9} {'theirs, s':>9} {'ratio':>6}")
    ratios: dict[str, float | None] = {}
    last = theirs["epochs"][-1]["seconds"]
    for target in TARGETS:
        mine, other = (seconds_to(run["epochs"], target) for run in (ours, theirs))
        ratio = None if mine is None else round(mine / (other or last), 3)
        ratios[f"{target:.2f}"] = ratio
        reached = [f"{seconds:.0f}" if seconds else "never" for seconds in (mine, other)]
        sign = " " if other or ratio is None else "<"  # at the end of its run it was not there yet
        print(f"{target:8.2f} {reached[0]:>9} {reached[1]:>9} {sign}{ratio or float('nan'):.3f}")
    standin = theirs["epochs"][-1]["standin_s"]
    print(f"whole runs: ours {ours['epochs'][-1]['seconds']:.0f} s, theirs {theirs['epochs'][-1]['seconds']:.0f} s "
          f"({standin:.0f} s in the stand-in for NMS taken off)")  # fmt: skip
    result = {
        "time_to_ap_ratio": ratios[f"{ASKED:.2f}"],
        "reference_reached_it": seconds_to(theirs["epochs"], ASKED) is not None,
        "final_ap_difference": round(ours["final_ap"] - theirs["final_ap"], 4),
        "final_ap_ours": round(ours["final_ap"], 4),
        "final_ap_theirs": round(theirs["final_ap"], 4),
    }
    others = [run for run in (json.loads(RESULT.read_text())["runs"] if RESULT.exists() else [])
              if run["key"] not in key.values()]  # fmt: skip
    record = result | {"ratios": ratios, "machine": machine(), "runs": [ours, theirs, *others]}
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
