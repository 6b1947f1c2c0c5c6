"""Our training beside the reference's on BCCD, in turn: images/s, the step and the loader alone, start, memory.

The last line is JSON. What the reference spends in a stand-in for torchvision's NMS is measured, subtracted, printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from contest import PEER_VERSION, REPOSITORY, Contender, Task, peer_python, step_times
from layout import to_yolo

sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine

RESULT = REPOSITORY / "bench" / "results" / "vs_peers.json"
FLOOR = 2.0


def figures(run: Contender, task: Task) -> dict[str, float]:
    """Sum up one run of either, on the clock of whoever started it."""
    steps = [event["time"] for event in run.events if event["kind"] == "step"]
    end = next(event for event in run.events if event["kind"] == "epoch" and event["epoch"] == task.epochs)
    seconds = end["time"] - steps[0]
    standin = end["standin_s"]
    images = task.images * task.epochs - task.batch  # the clock starts when the first batch is done
    return {
        "images_per_s": images / (seconds - standin),
        "images_per_s_with_standin": images / seconds,
        "standin_s": standin,
        "step_in_run_ms": 1000 * statistics.median(step_times(run.events)),
        "start_s": steps[0],
        "memory_mb": run.peak_bytes / 1e6,
    }


def compiled_figures(python: Path, task: Task, out: Path) -> dict[str, float]:
    """Try the reference with its own `compile=True`, once: its last epoch, and when its first step was done."""
    run = Contender(replace(task, epochs=2).theirs(python, out, "compile=True"), out)
    run.go_on()
    ends = [event for event in run.events if event["kind"] == "epoch"]
    seconds = ends[1]["time"] - ends[0]["time"] - (ends[1]["standin_s"] - ends[0]["standin_s"])
    steps = [event["time"] for event in run.events if event["kind"] == "step"]
    return {"images_per_s": task.images / seconds, "start_s": steps[0]}


def result_of(command: list[str], **environment: str) -> dict[str, float]:
    """Run a script that prints `RESULT` and JSON."""
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    found: dict[str, float] = json.loads(done.stdout.rsplit("RESULT ", 1)[1])
    return found


def our_step_ms(task: Task, folder: Path) -> float:
    """Our step alone, as `paceline bench` measures it, without the choice of how it computes being told to it."""
    file = folder / "step.json"
    command = [sys.executable, "-m", "paceline", "bench", f"model={task.model}", f"imgsz={task.imgsz}",
               f"batch={task.batch}", "device=cpu", "num_classes=3", "seconds=8", f"json={file}"]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found: float = json.loads(file.read_text())["step"]["whole_ms"]["median"]
    file.unlink()
    return found


def their_step_ms(python: Path, task: Task) -> float:
    """Measure the reference's network, loss and an optimiser on one batch that lies ready."""
    script = REPOSITORY / "bench" / "peer" / "peer_step.py"
    words = [task.model, str(task.imgsz), str(task.batch), "3", "8"]
    return 1000 * result_of([str(python), str(script), *words])["median_s"]


def loader_rates(python: Path, task: Task) -> dict[str, float]:
    """Images per second of one core of both loaders, from the set in memory."""
    loaders, one = REPOSITORY / "bench" / "data", {"OMP_NUM_THREADS": "1"}
    ours = result_of([sys.executable, str(loaders / "ours.py"), str(task.data_yaml), str(task.imgsz), "host", "decoded",
                      "1", "6"], **one)["epochs"]  # fmt: skip
    theirs = result_of([str(python), str(loaders / "peer_loader.py"), str(task.data_yaml), str(task.imgsz), "ram", "2"],
                       **one)  # fmt: skip
    return {
        name: statistics.median(epoch[0] / epoch[1] for epoch in epochs)  # type: ignore[index,attr-defined]
        for name, epochs in (("ours", ours), ("theirs", theirs))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--peer", type=Path, default=REPOSITORY / "build" / "peer", help="environment of the reference")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--no-compile", action="store_true", help="do not try the reference with compile=True")
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    python = peer_python(options.peer)
    found: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    steps: dict[str, list[float]] = {"ours": [], "theirs": []}
    loaders: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        data_yaml = to_yolo(options.data, Path(folder) / "yolo")
        images = len(list((data_yaml.parent / "images" / "train").iterdir()))
        task = Task(data=options.data, data_yaml=data_yaml, images=images)
        for number in range(options.rounds):
            for name, command in (("ours", task.ours), ("theirs", lambda out: task.theirs(python, out))):
                out = Path(folder) / f"{name}{number}"
                run = Contender(command(out), out)
                run.go_on()
                found[name].append(figures(run, task))
            steps["ours"].append(our_step_ms(task, Path(folder)))
            steps["theirs"].append(their_step_ms(python, task))
            for name, rate in loader_rates(python, task).items():
                loaders[name].append(rate)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
        compiled = None if options.no_compile else compiled_figures(python, task, Path(folder) / "compiled")
    table = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        | {"step_ms": statistics.median(steps[name]), "loader_images_per_s": statistics.median(loaders[name])}
        for name, rows in found.items()
    }
    ours, theirs = table["ours"], table["theirs"]
    best = max(theirs["images_per_s"], compiled["images_per_s"] if compiled else 0.0)
    print(f"{'':28} {'ours':>10} {'theirs':>10}")
    for key in ours:
        print(f"{key:28} {ours[key]:10.2f} {theirs[key]:10.2f}")
    if compiled:
        rate, start = compiled["images_per_s"], compiled["start_s"]
        print(f"theirs with compile=True: {rate:.2f} images/s, first step at {start:.0f} s")
    result = {
        "images_ratio": round(ours["images_per_s"] / best, 3),
        "step_ratio": round(theirs["step_ms"] / ours["step_ms"], 3),
        "loader_ratio": round(ours["loader_images_per_s"] / theirs["loader_images_per_s"], 3),
        "start_ratio": round(theirs["start_s"] / ours["start_s"], 3),
        "memory_ratio": round(ours["memory_mb"] / theirs["memory_mb"], 3),
    }
    record = result | {
        "floor_of_images_ratio": FLOOR,
        "reference": f"ultralytics {PEER_VERSION}",
        "task": f"bccd_voc, {task.model}, {task.imgsz} px, batch {task.batch}, {task.epochs} epochs",
        "medians": table,
        "rounds": found,
        "reference_compiled": compiled,
        "machine": machine(),
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
