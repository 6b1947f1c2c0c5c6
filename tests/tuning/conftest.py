"""A trial program without torch: writes the metrics that its options ask for, in milliseconds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

PROGRAM = """
import json, os, signal, sys, threading, time
from pathlib import Path
line = sys.stdin.readline()
if not line:
    sys.exit(0)
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
order = json.loads(line)
options, folder = order["options"], Path(order["folder"])
(folder / "pid").write_text(str(os.getpid()))
lr0, how = options["lr0"], options.get("how", "")
if how == "killed" and lr0 > 1:
    os.kill(os.getpid(), signal.SIGKILL)
if how == "ended once" and folder.name == "00000":
    (folder / "ending.json").write_text(json.dumps({"ending": "interrupted", "reason": "a signal asked it to end"}))
    sys.exit(0)
if how in ("mistake", "broken"):
    told = {"ending": "failed", "reason": f"it is {how}", "is_mendable": how == "mistake"}
    (folder / "ending.json").write_text(json.dumps(told))
    sys.exit(0)
if how == "hangs":
    threading.Event().wait()
reached = max(0.0, 0.8 - abs(lr0 - 0.3)) + 0.001 * options.get("seed", 0)
start = time.monotonic()
for epoch in range(1, options["epochs"] + 1):
    while time.monotonic() - start < 0.02 * epoch * options.get("slow", 1):
        time.sleep(0.002)
    record = {"kind": "epoch", "epoch": epoch, "epochs": options["epochs"], "elapsed_s": epoch,
              "evaluation": {"ap": reached * epoch / options["epochs"]}}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(record) + "\\n")
    if how == "diverges" and lr0 > 1:
        (folder / "ending.json").write_text(json.dumps({"ending": "diverged", "reason": "it diverged"}))
        sys.exit(0)
if how != "silent":
    (folder / "ending.json").write_text(json.dumps({"ending": "complete", "reason": ""}))
sys.exit(3 if how == "silent" else 0)
"""


@pytest.fixture
def program(tmp_path: Path) -> Sequence[str]:
    """Command of the trial program."""
    file = tmp_path / "fake_trial.py"
    file.write_text(PROGRAM)
    return [sys.executable, str(file)]
