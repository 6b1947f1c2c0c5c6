"""Training in two processes, from everywhere that it is started: the same run, whole results, and an end in time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from pathlib import Path

IN_TIME_S = 30

WORDS = (
    "imgsz=64", "batch=4", "nbs=4", "amp=off", "plots=false", "workers=1", "device=cpu", "devices=2",
)  # fmt: skip
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}

SCRIPT = """
    from paceline import YOLO
    from paceline.callbacks import Callback

    class Witness(Callback):
        def __init__(self):
            self.epochs = []
            self.note = lambda record: self.epochs.append((record.epoch, record.images))
        def on_start(self, record):
            self.file = open(record.folder / "notes.txt", "w")  # which stays there
        def on_epoch(self, record):
            self.note(record)

    witness = Witness()
    print("loaded")

    model = YOLO("yolo11n")
    result = model.train(
        data={data!r}, project={project!r}, epochs=2, imgsz=64, batch=4, nbs=4, amp="off", plots=False, workers=1,
        device="cpu", devices=2, callbacks=[witness],
    )
    print("answer", type(result).__name__, result.end.epochs, witness.epochs, len(model.names))
"""
ANSWER = "answer TrainResult 2 [(1, 12), (2, 12)] 2"


def command(data: Path, project: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "paceline", "train", f"data={data}", f"project={project}", "name=job", *WORDS, *words]


def test_a_script_without_a_guard_keeps_its_callbacks(squares: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(data=str(squares), project=str(tmp_path / "runs")))
    run = subprocess.run(
        [sys.executable, str(script)], check=False, capture_output=True, text=True, timeout=300, env=ENVIRONMENT
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("loaded") == 1
    assert run.stdout.rstrip().endswith(ANSWER)
    assert run.stdout.count("epoch 1/2") == 1
    lines = [json.loads(line) for line in (tmp_path / "runs/train/metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", "epoch", "epoch", "end"]


@pytest.mark.slow
def test_a_notebook_keeps_its_callbacks(squares: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a kernel that sees it does not show what its children print
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient")
    source = textwrap.dedent(SCRIPT).format(data=str(squares), project=str(tmp_path / "runs"))
    cells = [nbformat.v4.new_code_cell(part) for part in source.split('print("loaded")')]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python"}
    client.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    said = "".join(output.get("text", "") for output in cells[-1].outputs)
    assert ANSWER in said
    assert said.count("epoch 1/2") == 1  # what the ranks print is seen in the cell


def ranks(parent: subprocess.Popen[str], metrics: Path) -> list[psutil.Process]:
    """Wait for the first epoch's end, and name the processes that train."""
    end = time.monotonic() + 300  # a start may be slow beside other programs; what is tested comes after it
    while not metrics.exists() or '"kind": "epoch"' not in metrics.read_text():
        assert time.monotonic() < end
        assert parent.poll() is None, parent.communicate()
        time.sleep(0.05)
    found = psutil.Process(parent.pid).children()
    workers = [process for process in found if "paceline.parallel.worker" in process.cmdline()]
    assert len(workers) == 2
    return workers


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_in_training_ends_the_run(squares: Path, tmp_path: Path, number: signal.Signals) -> None:
    words = command(squares, tmp_path, "epochs=5000", "patience=0")
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    workers = ranks(parent, tmp_path / "job" / "metrics.jsonl")
    time.sleep(random.uniform(0, 1))
    victim = random.choice(workers)
    rank = victim.environ()["RANK"]
    victim.send_signal(number)
    _, said = parent.communicate(timeout=IN_TIME_S)
    assert parent.returncode == 1
    assert said.count("paceline: ") == 1, said
    assert f"paceline: rank {rank} on {os.uname().nodename} was " in said
    _, alive = psutil.wait_procs(workers, timeout=1)
    assert alive == []


@pytest.mark.slow
def test_the_same_command_goes_on_after_a_signal(squares: Path, tmp_path: Path) -> None:
    words = command(squares, tmp_path, "epochs=8", "resume=auto", "patience=0")
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    ranks(parent, tmp_path / "job" / "metrics.jsonl")
    parent.send_signal(signal.SIGTERM)
    said = parent.communicate(timeout=IN_TIME_S)
    assert parent.returncode == 0, said
    assert (tmp_path / "job" / "PREEMPTED").exists()
    subprocess.run(words, check=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    assert (tmp_path / "job" / "DONE").exists()
    lines = [json.loads(line) for line in (tmp_path / "job/metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == list(range(1, 9))


@pytest.mark.slow
def test_torchrun_is_the_same_run(squares: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    own, other = command(squares, tmp_path / "own", "epochs=1"), command(squares, tmp_path / "other", "epochs=1")
    for words in (own, [*torchrun, *other[1:]]):
        subprocess.run(words, check=True, capture_output=True, timeout=300, env=ENVIRONMENT)
    files = [tmp_path / name / "job" / "weights" / "last.safetensors" for name in ("own", "other")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_what_does_not_go_together_is_refused_at_once(squares: Path, tmp_path: Path) -> None:
    run = subprocess.run(
        [*command(squares, tmp_path), "device=0,1", "devices=3"], check=False, capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr == "paceline: device=0,1 names 2 devices and devices=3 asks for another number; drop one.\n"
