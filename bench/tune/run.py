"""A search side by side against one after the other, and one with a ruinous parameter; the last line is JSON."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
from optuna.trial import TrialState

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine  # noqa: E402

SEEDS_BY_HAND = (100, 101, 102)
RUINOUS = "lr0: {low: 0.0001, high: 10.0, log: true}\n"


def search(project: Path, name: str, cores: set[int], options: list[str]) -> float:
    """Seconds of a search that may use some cores."""
    command = [sys.executable, "-m", "paceline", "tune", *options, f"project={project}", f"name={name}", "device=cpu"]
    start = time.perf_counter()
    subprocess.run(
        command,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return time.perf_counter() - start


def study_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """Trials of a finished search."""
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}").get_trials()


def gaps(folder: Path) -> list[float]:
    """Seconds from the end of each trial to the start of the first step of the next one in its slot."""
    slots: dict[str, list[tuple[float, float]]] = {}
    for trial in study_of(folder):
        file = folder / "trials" / f"{trial.number:05d}" / "metrics.jsonl"
        epochs = [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "epoch"]
        if not epochs:
            continue
        assert trial.datetime_complete is not None
        # The last line was written when its epoch ended, so many seconds after the first step began.
        started = file.stat().st_mtime - epochs[-1]["elapsed_s"]
        slots.setdefault(trial.user_attrs["device"], []).append((started, trial.datetime_complete.timestamp()))
    return [
        following[0] - before[1]
        for times in map(sorted, slots.values())
        for before, following in itertools.pairwise(times)
    ]


def by_hand(folder: Path, seeds: tuple[int, ...]) -> list[float]:
    """AP of runs with the best configuration and seeds that the search has not seen, as a user would start them."""
    reached = []
    for seed in seeds:
        command = [
            sys.executable, "-m", "paceline", "train", "--config", str(folder / "best.yaml"), f"seed={seed}",
            f"project={folder}", f"name=by_hand{seed}", "device=cpu",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = (folder / f"by_hand{seed}" / "metrics.jsonl").read_text().splitlines()
        epochs = [line for line in map(json.loads, lines) if line["kind"] == "epoch"]
        reached.append(max(line["evaluation"]["ap"] for line in epochs))
    return reached


def side_by_side(data: Path, project: Path, rounds: int) -> dict[str, object]:
    """Time the same four trials in two slots of one core, in one such slot, and in one of both cores."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    assert len(cores) == 2, "this bench needs two cores"
    common = [
        str(data), "model=yolo11n", "imgsz=160", "batch=16", "epochs=3", "trials=4", "sampler=random", "pruner=none",
    ]  # fmt: skip
    seconds: dict[str, list[float]] = {"two_slots": [], "one_slot": [], "one_slot_of_two_cores": []}
    values: dict[str, list[dict[str, object]]] = {}
    search(project, "warm", set(cores), [*common[:5], "epochs=1", "trials=1", "cores_per_trial=2"])
    for number in range(rounds):
        for kind, allowed, width in (
            ("two_slots", set(cores), 1),
            ("one_slot", {cores[0]}, 1),
            ("one_slot_of_two_cores", set(cores), 2),
        ):
            name = f"{kind}{number}"
            seconds[kind].append(search(project, name, allowed, [*common, f"cores_per_trial={width}"]))
            trials = study_of(project / name)
            assert all(trial.state == TrialState.COMPLETE for trial in trials)
            values.setdefault(kind, [trial.params for trial in trials])
    assert values["two_slots"] == values["one_slot"], "both did the same trials"
    medians = {kind: statistics.median(times) for kind, times in seconds.items()}
    return {
        "parallel_over_serial": round(medians["two_slots"] / medians["one_slot"], 3),
        "parallel_over_serial_on_two_cores": round(medians["two_slots"] / medians["one_slot_of_two_cores"], 3),
        "seconds": {kind: [round(value, 1) for value in times] for kind, times in seconds.items()},
    }


def ruinous(project: Path, trials: int) -> dict[str, object]:
    """Search the learning rate from 0.0001 to 10 on the embedded set, confirmed with three seeds."""
    space = project / "ruinous.yaml"
    space.write_text(RUINOUS)
    options = [
        "shapes", "model=yolo11n", "imgsz=96", "batch=8", "nbs=8", "epochs=9", "mosaic=0", "optimizer=AdamW",
        "lr0=0.003", "cls=1.0", f"space={space}", f"trials={trials}", "confirm=3", "finalists=2",
    ]  # fmt: skip
    seconds = search(project, "ruinous", set(sorted(os.sched_getaffinity(0))[:2]), options)
    found = study_of(project / "ruinous")
    whole = [trial.user_attrs["seconds"] for trial in found if trial.state == TrialState.COMPLETE]
    spent = sum(trial.user_attrs["seconds"] for trial in found)
    lines = [json.loads(line) for line in (project / "ruinous" / "confirm.jsonl").read_text().splitlines()]
    by_trial: dict[int, list[float]] = {}
    for line in lines:
        by_trial.setdefault(line["trial"], []).append(line["value"])
    means = {number: statistics.fmean(values) for number, values in by_trial.items()}
    best = max(means, key=lambda number: means[number])
    hand = by_hand(project / "ruinous", SEEDS_BY_HAND)
    between = gaps(project / "ruinous")
    table = [
        {
            "trial": trial.number,
            "lr0": round(trial.params["lr0"], 5),
            "ending": trial.user_attrs["ending"],
            "ap": trial.value,
            "seconds": round(trial.user_attrs["seconds"], 1),
        }
        for trial in found
    ]
    return {
        "ruinous_pruned": sum(t.state == TrialState.PRUNED for t in found),
        "ruinous_trials": len(found),
        "ruinous_time_saved": round(1 - spent / (statistics.fmean(whole) * len(found)), 3),
        "confirmed_best": round(means[best], 4),
        "confirmed_best_spread": round(statistics.stdev(by_trial[best]), 4),
        "confirmed_defaults": round(means[0], 4),
        "confirmed_defaults_spread": round(statistics.stdev(by_trial[0]), 4),
        "by_hand": round(statistics.fmean(hand), 4),
        "by_hand_spread": round(statistics.stdev(hand), 4),
        "gap_seconds_median": round(statistics.median(between), 2),
        "gap_seconds_longest": round(max(between), 2),
        "ruinous_seconds": round(seconds, 1),
        "ruinous_table": table,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--part", choices=("both", "side_by_side", "ruinous"), default="both")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    file = REPOSITORY / "bench" / "results" / "tune.json"
    result: dict[str, object] = {}
    if options.part != "both" and file.exists():  # the other part stays
        result = json.loads(file.read_text())
    with tempfile.TemporaryDirectory() as folder:
        if options.part != "ruinous":
            result |= side_by_side(options.data, Path(folder), options.rounds)
        if options.part != "side_by_side":
            result |= ruinous(Path(folder), options.trials)
    for row in result.get("ruinous_table", ()):  # type: ignore[attr-defined]
        reached = "" if row["ap"] is None else f"{row['ap']:.4f}"
        print(f"{row['trial']:3d}  lr0 {row['lr0']:9.5f}  {row['ending']:10} {reached:>7} {row['seconds']:6.1f} s")
    for kind, times in result.get("seconds", {}).items():  # type: ignore[attr-defined]
        print(f"{kind:24} {times}")
    result["machine"] = machine()
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in result if key not in {"ruinous_table", "seconds", "machine"}}))


if __name__ == "__main__":
    main()
