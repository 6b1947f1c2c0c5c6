"""Training end to end beside the reference's, for several sizes of a network, on the same images.

    python bench/vs_peers/sizes.py --data FOLDER/coco33 [--models n s m] [--device auto] [--peer-python PYTHON]

Each training is a process of its own: ours, then the reference's, of each size, on the 33 images of coco33 repeated to
4,096 entries, both without evaluation. They are set up for 100 epochs, so that rates, mosaic and what each chooses are
those of a real training, and ended when they have gone through enough. The clock stands from the end of the first epoch
to the end of the last, when the device has done what it was given (`bench/peer/events.py`); what the reference spends
in a stand-in for torchvision is taken off.

What is done is merged into one file at once, by device, model, size, batch, entries and versions of both, and is passed
over by the next call; no training is begun that might not end within `--limit` seconds. So sizes may be measured in
several short calls:

    python bench/vs_peers/sizes.py --data FOLDER/coco33 --models n s          then --models m l, then --models x

The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import CUT_OFF, ENOUGH, REPOSITORY, Contender, Task, peer_python
from layout import coco_to_yolo

sys.path.insert(0, str(REPOSITORY / "bench" / "step"))
from entries import repeated
from kept import here, key_of, merge, read_results

RESULTS = REPOSITORY / "bench" / "results" / "vs_peers_sizes.json"
STEP_RESULTS = REPOSITORY / "bench" / "results" / "step.json"
SIZES = ("n", "s", "m", "l", "x")
RATIOS = {"n": 5.0, "s": 4.0, "m": 2.5, "l": 2.0, "x": 1.8}
"""Of images/s, ours over theirs, that are aimed at on one H200, at 640 px and batch 64."""
SET_UP_EPOCHS = 100
OURS, THEIRS = "ours", "theirs"
EXPECTED_S = {OURS: 120.0, THEIRS: 75.0}
"""That a training takes on a GPU with everything to compile, until one of its kind has been seen."""
EXPECTED_OTHER_S = 150.0
"""The same of the reference with a further option."""
LOG_LINES = 5


def reference_of(python: Path) -> dict[str, Any]:
    """Versions of the reference in that interpreter, and whether it can write its results."""
    code = (
        "import importlib.metadata as m, json\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return ''\n"
        "try: import polars; writes = True\n"
        "except ImportError: writes = False\n"
        "names = ('ultralytics', 'torch', 'torchvision')\n"
        "print(json.dumps({'versions': {name: version(name) for name in names}, 'writes': writes}))"
    )
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if not found["versions"]["ultralytics"]:
        sys.exit(f"{python} has no ultralytics; name the interpreter of an environment that has with --peer-python.")
    return found


def figures(events: list[dict[str, Any]], *, images: int, batch: int) -> dict[str, Any] | None:
    """Sum up what a training has told: whole epochs after the first, or else steps within it; None where neither is.

    images: of an epoch, a multiple of `batch`.
    """
    steps = [event for event in events if event["kind"] == "step"]
    ends = [event for event in events if event["kind"] == "epoch"]
    if len(ends) > 1:
        spans_s = [_between(*pair) for pair in itertools.pairwise(ends)]
        found = {
            "images_per_s": images * len(spans_s) / sum(spans_s),
            "within_first_epoch": False,
            "epochs": len(spans_s),
            "epoch_s": [round(span_s, 3) for span_s in spans_s],
            "standin_s": ends[-1]["standin_s"] - ends[0]["standin_s"],
        }
    else:
        found = _within_first_epoch(events, batch)
        if not found:
            return None
    found["start_s"] = steps[0]["time"]
    peaks = [event for event in events if "gpu_allocated_bytes" in event]
    if peaks:
        found["gpu_allocated_mb"] = peaks[-1]["gpu_allocated_bytes"] / 1e6
        found["gpu_reserved_mb"] = peaks[-1]["gpu_reserved_bytes"] / 1e6
    start = next((event for event in events if event["kind"] == "start"), None)
    return found | ({"step": start["step"]} if start else {})


def _within_first_epoch(events: list[dict[str, Any]], batch: int) -> dict[str, Any]:
    """Images/s between two events of the first epoch that waited for the device, its first quarter left out.

    Empty where there are no two such events.
    """
    marks: list[tuple[int, dict[str, Any]]] = []
    steps = 0
    for event in events:
        steps += event["kind"] == "step"
        if event.get("settled") and steps:
            marks.append((steps, event))
        if event["kind"] in ("trained", "epoch"):
            break
    if len({number for number, _ in marks}) < 2:
        return {}
    last, end = marks[-1]
    first, begin = next((mark for mark in reversed(marks) if mark[0] <= max(last / 4, 1)), marks[0])
    return {
        "images_per_s": batch * (last - first) / _between(begin, end),
        "within_first_epoch": True,
        "steps": last - first,
        "standin_s": end["standin_s"] - begin["standin_s"],
    }


def _between(begin: dict[str, Any], end: dict[str, Any]) -> float:
    """Seconds, less those in the stand-in."""
    return float(end["time"] - begin["time"] - (end["standin_s"] - begin["standin_s"]))


def train(command: list[str], out: Path, arguments: argparse.Namespace, limit_s: float) -> dict[str, Any] | None:
    """Let one train until it has gone through enough; returns its figures, None where there are none, which is said."""

    def is_enough(events: list[dict[str, Any]]) -> bool:
        ends = [event["time"] for event in events if event["kind"] == "epoch"]
        return bool(len(ends) > arguments.epochs and ends[-1] - ends[0] >= arguments.seconds)

    shutil.rmtree(out, ignore_errors=True)
    contender = Contender(command, out, own_session=False, watch_s=1.0)
    ended = contender.go_to(is_enough, limit_s)
    found = figures(contender.events, images=arguments.entries, batch=arguments.batch)
    if ended != ENOUGH:
        log = (out / "log.txt").read_text(errors="replace").strip().splitlines()
        kept = "nothing is kept of it" if found is None else "what it had done is kept"
        print(f"{ended} after {contender.active_s:.0f} s; {kept}. The end of {out}/log.txt:", flush=True)
        print("\n".join(f"   {line[-200:]}" for line in log[-LOG_LINES:]), flush=True)
    else:
        shutil.rmtree(out, ignore_errors=True)
    if found is None:
        return None
    return found | {
        "ended": ended,
        "memory_mb": contender.peak_bytes / 1e6,
        "options": [word for word in command[4:] if "=" in word],
    }


def contest_key(record: dict[str, Any]) -> dict[str, Any]:
    """Return what has to be equal for trainings to be of one contest."""
    return key_of(record) | {"entries": record["options"]["entries"], "reference": record["reference"]["versions"]}


def row_of(record: dict[str, Any], step_results: Path) -> dict[str, Any]:
    """Return the figures of the table; of the reference, the best of what was tried counts."""
    runs = record["runs"]
    ours = runs.get(OURS)
    theirs = {name: run for name, run in runs.items() if name != OURS}
    best = max(theirs, key=lambda name: theirs[name]["images_per_s"]) if theirs else ""
    alone = [other["step"]["images_per_s"]["median"] for other in read_results(step_results)
             if key_of(other) == key_of(record)]  # fmt: skip
    options, size = record["options"], record["model"].removeprefix("yolo11")
    has_aim = "H200" in record["machine"]["device"] and (options["imgsz"], options["batch"]) == (640, 64)
    return {
        "model": record["model"],
        OURS: ours["images_per_s"] if ours else None,
        THEIRS: theirs[best]["images_per_s"] if theirs else None,
        "theirs_is": best,
        "ratio": ours["images_per_s"] / theirs[best]["images_per_s"] if ours and theirs else None,
        "aim": RATIOS.get(size) if has_aim else None,
        "of_step": ours["images_per_s"] / alone[0] if ours and alone else None,
        "start_s": {name: round(run["start_s"], 1) for name, run in runs.items()},
        "within_first_epoch": [name for name, run in runs.items() if run["within_first_epoch"]],
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    shown = {OURS: ",.1f", THEIRS: ",.1f", "ratio": ".2f", "aim": ".1f", "of_step": ".2f"}
    print(f"{'images/s':10}" + "".join(f"{heading.replace('_', ' '):>10}" for heading in shown) + "  first step at, s")
    for row in rows:
        cells = ["" if row[key] is None else format(row[key], kind) for key, kind in shown.items()]
        starts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in row["start_s"].items())
        print(f"{row['model']:10}" + "".join(f"{cell:>10}" for cell in cells) + f"  {starts}")
        if row["theirs_is"] not in ("", THEIRS):
            print(f"   the best of theirs: {row['theirs_is']}")
        if row["within_first_epoch"]:
            print(f"   of steps within the first epoch alone: {', '.join(row['within_first_epoch'])}")


@dataclass(frozen=True, kw_only=True)
class Contest:
    """What is the same for all sizes."""

    arguments: argparse.Namespace
    machine: dict[str, Any]
    python: Path
    """Interpreter of the reference."""
    reference: dict[str, Any]
    data_yaml: Path
    end: float
    """Of this call, by the monotonic clock."""

    @property
    def kinds(self) -> dict[str, tuple[str, ...]]:
        """Names of the trainings of each size, with what is asked for beyond the best settings."""
        tried = {f"{THEIRS}, {option}": (option,) for option in self.arguments.peer_try}
        return {OURS: (), THEIRS: (), **tried}

    def record(self, model: str) -> dict[str, Any]:
        """Return what is kept of a size, or a record without trainings."""
        options = {key: getattr(self.arguments, key) for key in ("imgsz", "batch", "entries")}
        empty = {"machine": self.machine, "reference": self.reference, "model": model, "options": options, "runs": {}}
        kept = (other for other in read_results(self.arguments.out) if contest_key(other) == contest_key(empty))
        return next(kept, empty)

    def command(self, model: str, kind: str, out: Path) -> list[str]:
        """Return the command of a training, both without evaluation.

        The reference's default is deterministic algorithms, which are slower on a GPU, and a save ends its training
        where it has no polars.
        """
        on_gpu, asked = "CUDA" in self.machine["versions"], self.arguments.device
        task = Task(
            data=self.data_yaml,
            data_yaml=self.data_yaml,
            images=self.arguments.entries,
            model=model,
            imgsz=self.arguments.imgsz,
            batch=self.arguments.batch,
            epochs=SET_UP_EPOCHS,
            device=("0" if asked in ("auto", "cuda") else asked) if on_gpu else "cpu",
        )
        if kind == OURS:
            return task.ours(out, "val=False")
        fixed = ("val=False", "deterministic=False", *(() if self.reference["writes"] else ("save=False",)))
        return task.theirs(self.python, out, *fixed, *self.arguments.peer_options, *self.kinds[kind])

    def carry_out(self, models: list[str]) -> list[str]:
        """Do what is not done yet and may end in time, keeping each result; returns what is left."""
        left: list[str] = []
        expected_s = {kind: EXPECTED_S.get(kind, EXPECTED_OTHER_S) for kind in self.kinds}
        begun_any = False
        for model, kind in itertools.product(models, self.kinds):
            name, record = f"{model}, {kind}", self.record(model)
            before = record["runs"].get(kind)
            if before is not None and before["ended"] != CUT_OFF:
                print(f"{name}: done before.", flush=True)
                continue
            rest_s = self.end - time.monotonic()
            if rest_s < expected_s[kind] and begun_any:
                left.append(name)
                continue
            begun, begun_any = time.monotonic(), True
            print(f"{name}: for {rest_s:.0f} s at most", flush=True)
            out = self.arguments.work / "runs" / re.sub(r"\W+", "-", name)
            found = train(self.command(model, kind, out), out, self.arguments, max(rest_s, 1.0))
            expected_s[kind] = time.monotonic() - begun
            if found is not None:
                merge(self.arguments.out, record | {"runs": record["runs"] | {kind: found}}, contest_key)
            if found is None or found["ended"] == CUT_OFF:
                left.append(name)
        return left


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data", type=Path, required=True, help="folder of coco33, with instances.json")
    made.add_argument("--entries", type=int, default=4096)
    made.add_argument("--models", nargs="+", help="sizes of yolo11, or names of networks; all sizes, or n on a CPU")
    made.add_argument("--imgsz", type=int, help="640, or 320 on a CPU")
    made.add_argument("--batch", type=int, help="64, or 8 on a CPU")
    made.add_argument("--device", default="auto", help="auto, cpu, or the number of a GPU")
    made.add_argument("--epochs", type=int, default=2, help="that count at least, after the first")
    made.add_argument("--seconds", type=float, default=10.0, help="that these take at least")
    made.add_argument("--limit", type=float, default=540.0, help="seconds that this call may take")
    made.add_argument("--out", type=Path, default=RESULTS)
    made.add_argument("--work", type=Path, default=REPOSITORY / "build" / "vs_peers", help="where trainings write")
    made.add_argument("--step-results", type=Path, default=STEP_RESULTS, help="of bench/step/run.py")
    made.add_argument("--peer-python", type=Path, help="interpreter with the reference; without, build/peer is made")
    made.add_argument("--peer-options", nargs="*", default=[], help="of every run of the reference: key=value ...")
    made.add_argument("--peer-try", nargs="*", default=[], help="of one more run of it each, such as compile=True")
    return made


def main() -> None:
    asked = parser()
    arguments = asked.parse_args()
    end = time.monotonic() + arguments.limit
    machine = here(arguments.device)
    on_gpu = "CUDA" in machine["versions"]
    arguments.imgsz, arguments.batch = (
        arguments.imgsz or (640 if on_gpu else 320),
        arguments.batch or (64 if on_gpu else 8),
    )
    arguments.work = arguments.work.resolve()
    if arguments.entries % arguments.batch:
        asked.error(f"--entries {arguments.entries} is no multiple of the batch, {arguments.batch}.")
    python = arguments.peer_python or peer_python(REPOSITORY / "build" / "peer")
    source = arguments.data.resolve()
    entries = repeated(source, arguments.entries, arguments.work)
    contest = Contest(
        arguments=arguments,
        machine=machine,
        python=python,
        reference=reference_of(python),
        data_yaml=coco_to_yolo(entries, source, arguments.work / f"{entries.name}-yolo"),
        end=end,
    )
    models = [f"yolo11{size}" if size in SIZES else size for size in arguments.models or (SIZES if on_gpu else "n")]
    left = contest.carry_out(models)
    rows = [row_of(contest.record(model), arguments.step_results) for model in models]
    print_table(rows)
    if left:
        print(f"Still to be measured: {'; '.join(left)}. Call this again.")
    shown = {row["model"]: {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows}
    print(json.dumps({"device": machine["device"], "left": left, "models": shown}))


if __name__ == "__main__":
    main()
