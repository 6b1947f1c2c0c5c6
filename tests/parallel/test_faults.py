"""Faults at random moments: all ranks end in time, with one message, and nothing of them stays behind."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from paceline.parallel.warden import Process

SCRIPT = Path(__file__).with_name("faulty.py")
IN_TIME_S = 30
"""What may pass between a fault, or a limit, and the end of the last process."""


@dataclass(kw_only=True)
class Run:
    """A launcher with two ranks, and what it leaves."""

    folder: Path
    parent: subprocess.Popen[str]

    def ranks(self) -> list[Process]:
        """Wait until both ranks work, and name their processes."""
        end = time.monotonic() + 300  # a start may be slow beside other programs; what is tested comes after it
        while not all((self.folder / f"step{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < end, "the ranks did not start"
            assert self.parent.poll() is None, self.parent.communicate()
            time.sleep(0.02)
        return [Process.of(int((self.folder / f"rank{rank}").read_text())) for rank in (0, 1)]

    def end(self, processes: list[Process], *, within_s: float = IN_TIME_S) -> str:
        """Wait for the end of everything, in time; returns what was said."""
        start = time.monotonic()
        out, err = self.parent.communicate(timeout=within_s)
        while any(process.state() != "X" for process in processes):
            assert time.monotonic() - start < within_s, "a rank outlived the run"
            time.sleep(0.05)
        assert (out == "") or self.parent.returncode == 0
        return err + out


def start(folder: Path, deed: str, step: int, *command: str) -> Run:
    words = [*(command or (sys.executable,)), str(SCRIPT), str(folder), deed, str(step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    return Run(folder=folder, parent=parent)


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def moment() -> int:
    """Draw a step; another one in every session."""
    return random.SystemRandom().randrange(5, 150)


@pytest.mark.parametrize(
    ("deed", "sentence"),
    [
        ("raise1", "RankError: rank 1 on {host} failed with ValueError: the moon is full (step {step}, phase step)"),
        ("kill0", "RankError: rank 0 on {host} was killed, or ended without a word (step "),
        ("freeze0", "RankError: rank 0 on {host} was stopped (step "),
        ("hang1", "RankError: rank 1 on {host} did not get on for 5 s at <dynamic-code>:"),
    ],
)
def test_a_fault_ends_all_ranks_with_one_message(tmp_path: Path, deed: str, sentence: str) -> None:
    before, step = shared_memory(), moment()
    run = start(tmp_path, deed, step)
    processes = run.ranks()
    said = run.end(processes, within_s=IN_TIME_S + 15)
    assert run.parent.returncode == 1
    assert said.startswith(sentence.format(host=os.uname().nodename, step=step)), said
    assert said.count("\n") == 1
    assert said.endswith("; all ranks were ended.\n")
    assert shared_memory() <= before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deed", "sentence"),
    [
        ("memory1", "rank 1 on {host} failed with OutOfMemoryError: CUDA out of memory."),
        ("leave1", "rank 1 on {host} was killed, or ended without a word"),
        ("freeze1", "rank 1 on {host} was stopped"),
        ("mistake1", "UserError: Choose another number.\n"),
    ],
)
def test_other_faults_too(tmp_path: Path, deed: str, sentence: str) -> None:
    step = moment()
    run = start(tmp_path, deed, step)
    said = run.end(run.ranks(), within_s=IN_TIME_S + 15)
    assert run.parent.returncode == 1
    assert sentence.format(host=os.uname().nodename, step=step) in said
    assert said.count("\n") == 1


def test_a_killed_launcher_takes_its_ranks_with_it(tmp_path: Path) -> None:
    run = start(tmp_path, "nothing", 0)
    processes = run.ranks()
    run.parent.kill()
    run.end(processes)
    assert run.parent.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("number", "status"), [pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGINT, 1)]
)
def test_a_signal_to_the_launcher_ends_all(tmp_path: Path, number: signal.Signals, status: int) -> None:
    run = start(tmp_path, "nothing", 0)
    processes = run.ranks()
    run.parent.send_signal(number)
    said = run.end(processes)
    assert run.parent.returncode in (status, -number), said


def test_ranks_that_are_asked_to_stop_take_the_same_last_step(tmp_path: Path) -> None:
    run = start(tmp_path, "stop", 0)
    processes = run.ranks()
    run.parent.send_signal(signal.SIGTERM)
    said = run.end(processes)
    steps = {int((tmp_path / f"step{rank}").read_text()) for rank in (0, 1)}
    assert len(steps) == 1
    assert said == f"result {steps.pop()}\n"
    assert run.parent.returncode == 0


@pytest.mark.slow
def test_a_fault_ends_torchrun_as_well(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    step = moment()
    run = start(tmp_path, "kill1", step, *command)
    said = run.end(run.ranks(), within_s=90)
    assert run.parent.returncode == 1
    assert said.count("paceline: rank") == 1
    assert f"paceline: rank 1 on {os.uname().nodename} was killed, or ended without a word" in said
