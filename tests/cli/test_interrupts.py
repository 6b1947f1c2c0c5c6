"""Ctrl-C ends a command cleanly however often it is pressed; one that hangs is ended at once by a later one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from paceline.cli import interrupts
from paceline.cli.interrupts import PATIENCE_S, Interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = """
import atexit, sys, threading
import paceline.cli.runs

def say(word):
    print(word, flush=True)
    assert sys.stdin.readline() == "go on\\n"

def train(words):
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    try:
        say("training")
    finally:
        say("ending")
        end.set()
        thread.join()
        print(threading.active_count(), "left", flush=True)

paceline.cli.runs.run_train = train
sys.argv = ["paceline", "train"]
atexit.register(say, "leaving")
from paceline.cli.main import main
sys.exit(main())
"""


@pytest.fixture
def command() -> Iterator[subprocess.Popen[str]]:
    """Return a `paceline train` that says what it does, and goes on when it is told to."""
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    ) as process:
        yield process
        process.kill()


def _after(process: subprocess.Popen[str], word: str, signals: int, *, goes_on: bool = True) -> None:
    """Wait for a word, then send signals, then let the process go on."""
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == f"{word}\n"
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
    if goes_on:
        process.stdin.write("go on\n")
        process.stdin.flush()


def test_nothing_disturbs_how_a_command_ends(command: subprocess.Popen[str]) -> None:
    _after(command, "training", 1, goes_on=False)
    _after(command, "ending", 2)
    _after(command, "1 left", 0, goes_on=False)
    _after(command, "leaving", 3)
    assert command.wait() == 130
    assert command.stderr is not None
    said = command.stderr.read()
    assert said.count("\n") == 1
    assert "interrupted; a run that has finished an epoch goes on by" in said


def test_a_command_that_is_left_alone_ends_as_ever(command: subprocess.Popen[str]) -> None:
    _after(command, "training", 0)
    _after(command, "ending", 0)
    _after(command, "1 left", 0, goes_on=False)
    _after(command, "leaving", 0)
    assert command.wait() == 0


def test_one_that_comes_much_later_ends_what_hangs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now, left = [100.0], list[int]()
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(interrupts.os, "_exit", left.append)
    handler = Interrupts()
    with pytest.raises(KeyboardInterrupt):
        handler(signal.SIGINT, None)
    for later_s in (0.0, 0.1, PATIENCE_S - 0.1):
        now[0] = 100.0 + later_s
        handler(signal.SIGINT, None)
    assert left == []
    now[0] = 100.0 + PATIENCE_S
    handler(signal.SIGINT, None)
    assert left == [130]
    assert "interrupted again" in capfd.readouterr().err


@pytest.mark.parametrize("others", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_that_ignores_or_handles_it_otherwise_is_left_as_it_is(others: signal.Handlers) -> None:
    before = signal.signal(signal.SIGINT, others)
    try:
        Interrupts().install()
        assert signal.getsignal(signal.SIGINT) is others
    finally:
        signal.signal(signal.SIGINT, before)
