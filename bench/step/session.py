"""All that a short session on a GPU should answer about the step: one command, within one limit, whatever goes wrong.

    python bench/step/session.py --out FOLDER [--data FOLDER/coco33 [--peer-python PYTHON]] [--limit 240]

```
tests     tests/gpu, with the names of those that failed, and of the one that did not end
kernels   a step of yolo11n eagerly and as a graph, with and without our kernels
compare   the graph with all that there is, and without each of some
run       the same by `paceline bench`, beside its limits, and end to end where there are data
peers     training end to end beside the reference's, where there are data and an interpreter that has it
sizes     the step, and end to end, for s, m, l and x
render    drawing and decoding on the device, and who decodes faster
joints    joint convolutions of yolo11n by each way to launch them
narrow    narrow ones
```
Each part is a process of its own, with a limit of its own, in this order; one that is cut off leaves what it has
printed. FOLDER then holds `session.json` with the last line of each, `step.json`, `vs_peers_sizes.json`, and
`session.txt`, all that was printed. In four minutes the first two parts fit, in nine most. On a CPU tests skip
themselves, parts that need a GPU are passed over, and the rest is small. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
STEP, RENDER = REPOSITORY / "bench" / "step", REPOSITORY / "bench" / "render" / "gpu.py"
PEERS = REPOSITORY / "bench" / "vs_peers" / "sizes.py"
MODEL = "yolo11n"
LEFT_OUT = ("streams", "branches", "lists", "moments", "ends", "sums")
"""What `kernels.py` leaves out in turn."""
ON_CPU = 3.0
"""How many times as long a part may take there."""
MOST_WORKERS = 14
"""That tests run in, beside each other on one GPU."""
LEAST_S = 10.0
"""A part of which there would be less left is not begun."""
_OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_OUTCOME = re.compile(rf"^(\S+::.*?) ({_OUTCOMES})\b", re.MULTILINE)
_OUTCOME_OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] ({_OUTCOMES}) (\S+::.*?) *$", re.MULTILINE)
_BEGUN = re.compile(r"^(\S+::\S+)\s*$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Part:
    """A process, and how long it may take."""

    name: str
    words: tuple[str, ...]
    limit_s: float
    needs_gpu: bool = True


def parts_of(arguments: argparse.Namespace, *, on_gpu: bool) -> tuple[Part, ...]:
    """List the parts in their order, the most telling first."""
    out, python = arguments.out, sys.executable
    tests = (python, "-m", "pytest", "tests/gpu", "-m", "gpu", "-vv", "--tb=short", "-p", "no:cacheprovider")
    if find_spec("xdist"):  # what takes long is to compile their kernels
        tests += ("-n", str(min(os.cpu_count() or 1, MOST_WORKERS)), "--dist", "worksteal")
    sizes = ("--seconds", "4") if on_gpu else ("--seconds", "0.3", "--imgsz", "64", "--batch", "2")
    data = ("--data", str(arguments.data), *(() if on_gpu else ("--entries", "33"))) if arguments.data else ()
    places = ("--out", str(out / "step.json"), "--work", str(out.parent / "entries"), "tune_step=quick")
    run = (python, str(STEP / "run.py"), "--device", arguments.device, *sizes, *data)
    models = ("--models", MODEL)
    beside: tuple[Part, ...] = ()
    if arguments.data and arguments.peer_python:
        small = () if on_gpu else ("--imgsz", "64", "--batch", "2", "--entries", "32", "--seconds", "1")
        words = (python, str(PEERS), "--device", arguments.device, "--data", str(arguments.data), *models, *small)
        words += ("--peer-python", str(arguments.peer_python), "--work", str(out.parent / "peers"), "--limit", "140")
        words += ("--out", str(out / "vs_peers_sizes.json"), "--step-results", str(out / "step.json"))
        beside = (Part(name="peers", words=words, limit_s=150.0, needs_gpu=False),)
    return (
        Part(name="tests", words=tests, limit_s=140.0, needs_gpu=False),
        Part(name="kernels", words=(python, str(STEP / "kernels.py"), "--model", MODEL), limit_s=60.0),
        Part(name="compare", words=(python, str(STEP / "kernels.py"), "--compare", *LEFT_OUT), limit_s=120.0),
        Part(name="run", words=(*run, "--models", "n", *places), limit_s=60.0, needs_gpu=False),
        *beside,
        Part(name="sizes", words=(*run, "--models", "s", "m", "l", "x", *places), limit_s=200.0),
        Part(name="render", words=(python, str(RENDER), "--seconds", "2"), limit_s=60.0),
        Part(name="joints", words=(python, str(STEP / "joints.py"), *models), limit_s=45.0),
        Part(name="narrow", words=(python, str(STEP / "narrow.py"), *models), limit_s=45.0),
    )


def carry_out(part: Part, log: Path, limit_s: float) -> dict[str, Any]:
    """Run a part and all that it starts; returns its status, seconds, and last line where that is JSON."""
    begun = time.monotonic()
    with log.open("ab") as file:
        file.write(f"== {part.name}\n".encode())
        file.flush()
        before = file.tell()
        process = subprocess.Popen(
            part.words, cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | str = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = "cut off"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # what compiles beside it, too
                process.wait()
    printed = log.read_bytes()[before:].decode(errors="replace")
    found: dict[str, Any] = {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    if part.name == "tests":
        return found | outcomes(printed)
    lines = printed.strip().splitlines()
    try:
        return found | {"result": json.loads(lines[-1])}
    except (IndexError, ValueError):
        return found | {"last_lines": lines[-5:]}


def outcomes(printed: str) -> dict[str, Any]:
    """Read what pytest prints, a line for each test: how many ended how, and the names of those that did not pass."""
    ended = dict(_OUTCOME.findall(printed)) | {name: how for how, name in _OUTCOME_OF_WORKER.findall(printed)}
    counts = {kind: list(ended.values()).count(kind) for kind in sorted(set(ended.values()))}
    failed = [name for name, outcome in ended.items() if outcome in ("FAILED", "ERROR")]
    last = printed.rstrip("\n").rpartition("\n")[2] + "\n"
    unfinished = [name for name in _BEGUN.findall(last) if name not in ended]
    return {"counts": counts, "failed": failed, "unfinished": unfinished}


def has_gpu(device: str) -> bool:
    code = "import torch; print(torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return device != "cpu" and asked.stdout.strip() == "True"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--data", type=Path, help="folder of coco33, with instances.json; without, the step alone")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the reference; without, no part `peers`")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds that this call may take")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", nargs="+", help="names of parts; all without")
    arguments = parser.parse_args()
    start, on_gpu = time.monotonic(), has_gpu(arguments.device)
    arguments.out = arguments.out.resolve()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "session.txt").unlink(missing_ok=True)
    session: dict[str, Any] = {}
    for part in parts_of(arguments, on_gpu=on_gpu):
        rest_s = arguments.limit - (time.monotonic() - start)
        if arguments.only and part.name not in arguments.only:
            continue
        if part.needs_gpu and not on_gpu:
            session[part.name] = {"status": "needs a GPU"}
        elif rest_s < LEAST_S:
            session[part.name] = {"status": "no time left"}
        else:
            limit_s = min(part.limit_s * (1.0 if on_gpu else ON_CPU), rest_s)
            print(f"{part.name}: for {limit_s:.0f} s at most", flush=True)
            session[part.name] = carry_out(part, arguments.out / "session.txt", limit_s)
        found = session[part.name]
        print(f"{part.name}: {found['status']}, {found.get('seconds', 0)} s, {found.get('counts', '')}", flush=True)
        for kind in ("failed", "unfinished"):
            for name in found.get(kind, ()):
                print(f"   {kind}: {name}", flush=True)
        content = json.dumps(session, indent=1) + "\n"
        (arguments.out / "session.json").write_text(content, encoding="utf-8")  # after each: a session may be cut off
    print(json.dumps({name: {"status": found["status"]} for name, found in session.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
