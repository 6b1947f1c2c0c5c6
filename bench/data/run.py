"""Our training loader beside the reference's, images per second of one core, in turn; the last line is JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from sets import SETS, BenchSet, lay_out

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(REPOSITORY / "bench" / "bccd"))
from machine import machine  # noqa: E402

FLOORS = {
    "coco33": {"encoded": 2.0, "cached": 2.0, "host_encoded": 4.0, "host_cached": 20.0},
    "bccd": {"encoded": 1.5, "cached": 1.5, "host_encoded": 3.0, "host_cached": 20.0},
    "deeppcb": {"encoded": 1.8, "cached": 2.0, "host_encoded": 1.8, "host_cached": 20.0},
}
WAYS = {
    "encoded": ("host", "encoded"),
    "cached": ("host", "decoded"),
    "host_encoded": ("packed", "encoded"),
    "host_cached": ("packed", "decoded"),
}
"""Row of the table -> how our loader is run; `host_` rows are the host's share where a device draws."""
EPOCHS = {"encoded": 2, "cached": 6, "host_encoded": 2, "host_cached": 20}


def run(command: list[str], cores: set[int]) -> object:
    """Run a measurement on some cores; returns what it printed."""
    done = subprocess.run(
        command,
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    return json.loads(done.stdout.rsplit("RESULT ", 1)[1])


def ours(data: Path, imgsz: int, row: str, cores: set[int], epochs: int = 0) -> dict[str, object]:
    """Measure our loader with as many threads as cores."""
    command = [sys.executable, str(HERE / "ours.py"), str(data), str(imgsz), *WAYS[row], str(len(cores))]
    return run([*command, str(epochs or EPOCHS[row])], cores)  # type: ignore[return-value]


def theirs(python: Path, data: Path, imgsz: int, cache: str, core: int) -> list[tuple[int, float, float]]:
    """Measure the reference's loader in its own process and environment."""
    return run([str(python), str(HERE / "peer_loader.py"), str(data), str(imgsz), cache, "2"], {core})  # type: ignore[return-value]


def rates(epochs: list[tuple[int, float, float]], column: int = 1) -> list[float]:
    """Images per second of each epoch: by the clock (column 1), or by the processor's time (column 2)."""
    return [epoch[0] / epoch[column] for epoch in epochs]


def measure(chosen: BenchSet, data: Path, python: Path, rounds: int, core: int) -> dict[str, dict[str, float]]:
    """Medians over rounds in which the reference and each of our ways come in turn."""
    found: dict[str, list[float]] = {}
    for number in range(rounds):
        for cache in ("none", "ram"):
            epochs = theirs(python, data, chosen.imgsz, cache, core)
            found.setdefault(f"theirs_{cache}", []).extend(rates(epochs))
            found.setdefault(f"theirs_{cache}_cpu", []).extend(rates(epochs, 2))
        for row in WAYS:
            result = ours(data, chosen.imgsz, row, {core})
            found.setdefault(row, []).extend(rates(result["epochs"]))  # type: ignore[arg-type]
            found.setdefault(f"{row}_cpu", []).extend(rates(result["epochs"], 2))  # type: ignore[arg-type]
            found.setdefault(f"{row}_decodes", []).append(float(result["decodes_per_image"]))  # type: ignore[arg-type]
        print(f"{chosen.name}: round {number + 1} of {rounds}", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in found.items()}
    table = {}
    for row in WAYS:
        cache = "none" if row.endswith("encoded") else "ram"
        table[row] = {
            "ours_per_s": round(medians[row], 1),
            "theirs_per_s": round(medians[f"theirs_{cache}"], 1),
            "ratio": round(medians[row] / medians[f"theirs_{cache}"], 2),
            "ratio_of_processor_time": round(medians[f"{row}_cpu"] / medians[f"theirs_{cache}_cpu"], 2),
            "floor": FLOORS[chosen.name][row],
            "decodes_per_image": round(medians[f"{row}_decodes"], 3),
        }
    return table


def scaling(data: Path, imgsz: int, rounds: int) -> float:
    """Rate of two threads on two cores over one thread on one core."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    ratios = []
    for _ in range(rounds):
        one, two = (
            statistics.median(rates(ours(data, imgsz, "cached", set(used), 8)["epochs"]))  # type: ignore[arg-type]
            for used in (cores[:1], cores)
        )
        ratios.append(two / one)
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--peer", type=Path, default=REPOSITORY / "build" / "peer", help="environment of the reference")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(
            f"{options.data} does not exist; name the folder that holds coco33, bccd_voc and deeppcb_yolo: --data."
        )
    python = options.peer / "bin" / "python"
    if not python.exists():
        subprocess.run(["bash", str(REPOSITORY / "bench" / "peer" / "peer_env.sh"), str(options.peer)], check=True)
    tables, result = {}, {}
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        places = {chosen.name: lay_out(chosen, options.data, Path(folder) / chosen.name) for chosen in SETS}
        for chosen in SETS:
            tables[chosen.name] = measure(chosen, places[chosen.name], python, options.rounds, core)
            result |= {f"{chosen.name}_{row}_ratio": figures["ratio"] for row, figures in tables[chosen.name].items()}
        result["threads_2_over_1"] = round(scaling(places["coco33"], 640, options.rounds), 2)
        memory = ours(places["bccd"], 320, "cached", {core}, 20)["rss_bytes"]
    growth_mb = (memory[-1] - memory[2]) / 1e6  # type: ignore[index]
    print(f"{'set':8} {'from':13} {'ours/s':>8} {'theirs/s':>8} {'ratio':>6} {'by CPU':>6} {'floor':>6} {'decodes':>7}")
    for name, table in tables.items():
        for row, figures in table.items():
            numbers = [figures[key] for key in ("ratio", "ratio_of_processor_time", "floor", "decodes_per_image")]
            speeds = f"{figures['ours_per_s']:8.0f} {figures['theirs_per_s']:8.0f}"
            print(f"{name:8} {row:13} {speeds} " + "{:6.2f} {:6.2f} {:6.1f} {:7.3f}".format(*numbers))
    result["memory_growth_mb_over_18_epochs"] = round(growth_mb, 1)
    record = result | {"tables": tables, "rounds": options.rounds, "machine": machine()}
    file = REPOSITORY / "bench" / "results" / "data.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
