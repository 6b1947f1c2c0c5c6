"""Both trainers as processes of their own: how they are started, what they tell, how they take turns."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
PEER_VERSION = "8.4.190"
ENOUGH, CUT_OFF = "enough", "cut off"


def peer_python(folder: Path) -> Path:
    """Return the interpreter of the reference's environment, which is made where it is not there."""
    python = folder / "bin" / "python"
    script = REPOSITORY / "bench" / "peer" / "peer_env.sh"
    if not python.exists():
        subprocess.run(["bash", str(script), str(folder), PEER_VERSION], check=True)
    return python


@dataclass(frozen=True, kw_only=True)
class Task:
    """What both train: the same data, network, size, batch and number of epochs."""

    data: Path
    """As ours reads it."""
    data_yaml: Path
    """The same set as the reference reads it."""
    images: int
    model: str = "yolo11n"
    imgsz: int = 320
    batch: int = 16
    epochs: int = 3
    seed: int = 0
    device: str = "cpu"
    """`cpu`, or the number of a GPU."""

    def ours(self, out: Path, *words: str) -> list[str]:
        """Command of our run; events go to `out`."""
        options = {"model": self.model, "imgsz": self.imgsz, "batch": self.batch, "epochs": self.epochs,
                   "seed": self.seed, "plots": False, "patience": 0, "device": self.device}  # fmt: skip
        words = (*(f"{name}={value}" for name, value in options.items()), *words)
        return [sys.executable, str(HERE / "ours_train.py"), str(self.data), str(out), *words]

    def theirs(self, python: Path, out: Path, *words: str) -> list[str]:
        """Command of the reference's run, with the set in memory and a loader on every core."""
        script = REPOSITORY / "bench" / "peer" / "peer_train.py"
        fixed = [str(self.data_yaml), self.model, str(self.imgsz), str(self.epochs), str(self.batch), str(out)]
        best = ("cache=ram", f"workers={len(os.sched_getaffinity(0))}", f"seed={self.seed}", f"device={self.device}")
        return [str(python), str(script), *fixed, *best, *words]


@dataclass
class Contender:
    """A training that can be held and let go on; its clock stands still while it is held."""

    command: list[str]
    out: Path
    own_session: bool = True
    """Or else it ends with whoever ends this process and its group."""
    watch_s: float = 0.25
    """Seconds between two looks at its memory."""
    active_s: float = 0.0
    peak_bytes: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)
    """What it told, `time` being seconds of its own clock since it was started."""
    _process: psutil.Popen | None = None
    _read: int = 0
    _spans: list[tuple[float, float]] = field(default_factory=list)
    """Begin and end of the times in which it ran, by the wall clock."""

    @property
    def is_done(self) -> bool:
        """Whether it has ended."""
        return self._process is not None and self._process.poll() is not None

    @property
    def epochs(self) -> int:
        """Epochs that it has told of."""
        return sum(event["kind"] == "epoch" for event in self.events)

    def go_on(self, epochs: int | None = None) -> None:
        """Let it run until it has told of so many further epochs, or to its end; then hold it."""
        goal = None if epochs is None else self.epochs + epochs
        self._run(lambda: goal is not None and self.epochs >= goal)
        if self.is_done and self.status:
            sys.exit(f"{' '.join(self.command)}\nended with status {self.status}; see {self.out}/log.txt")

    def go_to(self, is_enough: Callable[[list[dict[str, Any]]], bool], limit_s: float) -> str:
        """Let it run until what it has told is enough, but no longer than so many seconds, and end it.

        Returns ENOUGH, CUT_OFF, or `ended with status N` where it ended by itself, be it well or not.
        """
        end = time.monotonic() + limit_s
        try:
            self._run(lambda: is_enough(self.events) or time.monotonic() >= end)
            ended_itself = self.is_done
        finally:
            self.stop()
        if is_enough(self.events):
            return ENOUGH
        return f"ended with status {self.status}" if ended_itself else CUT_OFF

    @property
    def status(self) -> int | None:
        """What it ended with."""
        return None if self._process is None else self._process.poll()

    def _run(self, is_enough: Callable[[], bool]) -> None:
        """Let it run until that holds, or to its end; then hold it."""
        begin = time.time()
        if self._process is None:
            self.out.mkdir(parents=True, exist_ok=True)
            with (self.out / "log.txt").open("wb") as log:
                self._process = psutil.Popen(
                    self.command, stdout=log, stderr=subprocess.STDOUT, start_new_session=self.own_session
                )
        else:
            self._send(signal.SIGCONT)
        watch = threading.Event()
        watcher = threading.Thread(target=self._watch_memory, args=(watch,))
        watcher.start()
        self._spans.append((begin, float("inf")))
        try:
            while not self.is_done and not is_enough():
                time.sleep(0.02)
                self._take_events()
            if not self.is_done:
                self._send(signal.SIGSTOP)
        finally:
            watch.set()
            watcher.join()
        self._spans[-1] = (begin, time.time())
        self.active_s += self._spans[-1][1] - begin
        self._take_events()

    def stop(self) -> None:
        """End it, if it has not ended yet."""
        if self._process is not None and not self.is_done:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        for process in [self._process, *self._process.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):  # a loader may have ended meanwhile
                process.send_signal(number)

    def _own_clock(self, moment: float) -> float:
        """Turn a time of the wall clock into seconds of activity."""
        return sum(min(moment, end) - begin for begin, end in self._spans if begin <= moment)

    def _take_events(self) -> None:
        file = self.out / "events.jsonl"
        if not file.exists():
            return
        whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for line in whole[self._read :]:
            event = json.loads(line)
            self.events.append(event | {"time": self._own_clock(event["time"])})
        self._read = len(whole)

    def _watch_memory(self, stop: threading.Event) -> None:
        assert self._process is not None
        while not stop.wait(self.watch_s):
            total = 0
            try:
                for process in [self._process, *self._process.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:
                continue
            self.peak_bytes = max(self.peak_bytes, total)


def step_times(events: list[dict[str, Any]]) -> list[float]:
    """Seconds between steps that follow each other within an epoch, those of the first epoch left out."""
    times, last, epochs = [], None, 0
    for event in events:
        if event["kind"] == "step":
            if last is not None and epochs:
                times.append(event["time"] - last)
            last = event["time"]
        elif event["kind"] == "epoch":
            last, epochs = None, epochs + 1
    return times
