"""Search: keeps every slot busy with a trial, watches the trials' metrics, ends hopeless ones, records all endings.

source (study, or confirmation)  --next-->  slot 0: process ... | process ...      a process for the next trial
      ^                                     slot 1: process ......... | process    waits ready in each slot
      +-------- report, finish ----------  metrics.jsonl of each run
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from paceline.records import RunFolder
from paceline.tuning.outcome import Objective, Outcome, evaluations
from paceline.tuning.process import TrialProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from paceline.tuning.slots import Slot

ENDING_FILE = "ending.json"
_POLL_S = 0.1
_TEND_EVERY_S = 30.0
_ASK_AGAIN_S = 5.0
"""A source that had nothing may have something later: values of a trial that was interrupted elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to be done."""

    key: str
    """Name of its folder, and how tables call it."""
    number: int
    """Trial that it belongs to."""
    options: Mapping[str, Any]
    """Options that differ from those of all runs."""


class Source(Protocol):
    """Where jobs come from, and where their results go."""

    def next(self, device: str) -> Job | None:
        """Take the next job, or None where there is none left."""

    def report(self, job: Job, seconds: float, ap: float) -> bool:
        """Take the AP of an epoch; whether to end the job."""

    def finish(self, job: Job, outcome: Outcome, seconds: float) -> Outcome:
        """Take the end of a job; returns the ending that holds. Raises UserError where going on has no sense."""

    def tend(self) -> None:
        """Do what has to be done every half minute or so."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is known of a job, for a table."""

    key: str
    state: Literal["running", "complete", "pruned", "diverged", "failed", "interrupted"]
    device: str
    epoch: int
    epochs: int
    ap: float | None
    seconds: float
    reason: str = ""


@dataclass(kw_only=True)
class _Run:
    """A job on its way."""

    job: Job
    process: TrialProcess
    folder: RunFolder
    epochs: int
    size: int = 0
    lines: list[Mapping[str, Any]] = field(default_factory=list)
    reported: int = 0


class Search:
    """Runs the jobs of a source until there is none left or the time is over."""

    def __init__(
        self,
        *,
        slots: Sequence[Slot],
        command: Sequence[str],
        base: Mapping[str, Any],
        folder: Path,
        objective: Objective,
        show: Callable[[Row], None],
    ) -> None:
        """Prepare.

        command: program of a trial; takes the cores' numbers, then one line of JSON (`paceline.tuning.process`).
        base: options of all runs.
        folder: where the jobs' run folders are made.
        """
        self._slots = slots
        self._command = command
        self._base = base
        self._folder = folder
        self._objective = objective
        self._show = show
        self._ready: dict[Slot, TrialProcess] = {}
        self._runs: dict[Slot, _Run] = {}
        self._idle_until: dict[Slot, float] = {}

    def run(self, source: Source, *, until: float | None = None) -> bool:
        """Do the jobs of a source; returns False where `until` (of the monotonic clock) came first.

        Whatever ends this early, an exception or Ctrl-C, ends the running jobs as interrupted.
        """
        tended = time.monotonic()
        self._idle_until.clear()
        try:
            while True:
                self._fill(source)
                if not self._runs:
                    return True
                if until is not None and time.monotonic() >= until:
                    self._interrupt(source, "the time of the search was over")
                    return False
                if time.monotonic() - tended > _TEND_EVERY_S:
                    source.tend()
                    tended = time.monotonic()
                for slot in [*self._runs]:
                    self._watch(slot, source)
                time.sleep(_POLL_S)
        except BaseException:
            self._interrupt(source, "the search was ended")
            raise
        finally:
            for process in self._ready.values():
                process.end()
            self._ready.clear()

    def _fill(self, source: Source) -> None:
        """Start a job in every free slot."""
        for slot in self._slots:
            if slot in self._runs or time.monotonic() < self._idle_until.get(slot, 0.0):
                continue
            job = source.next(slot.name)
            if job is None:
                self._idle_until[slot] = time.monotonic() + _ASK_AGAIN_S
                continue
            process = self._ready.pop(slot, None) or TrialProcess(self._command, slot)
            folder = RunFolder(path=self._folder / job.key)
            (folder.path / ENDING_FILE).unlink(missing_ok=True)
            folder.metrics.unlink(missing_ok=True)
            options = {
                **self._base,
                **job.options,
                "device": slot.device,
                "project": str(self._folder),
                "name": job.key,
                "exist_ok": True,
            }
            process.give(options, folder.path)
            self._runs[slot] = _Run(job=job, process=process, folder=folder, epochs=int(options["epochs"]))
            self._tell(self._runs[slot], "running")

    def _watch(self, slot: Slot, source: Source) -> None:
        """Read what a run has written since the last look; settle it where it has ended."""
        run = self._runs[slot]
        status = run.process.poll()  # before reading, so that the last lines are read too
        if self._read(run):
            if slot not in self._ready:  # not earlier: it would take the core while the run gets ready
                self._ready[slot] = TrialProcess(self._command, slot)
            for seconds, ap in evaluations(run.lines)[run.reported :]:
                run.reported += 1
                if source.report(run.job, seconds, ap) and status is None:
                    run.process.end()
                    return self._settle(slot, source, Outcome(ending="pruned", reason="others were better by then"))
            self._tell(run, "running")
        if status is not None:
            return self._settle(slot, source, self._ending(run, status))
        return None

    def _read(self, run: _Run) -> bool:
        """Read the metrics where they have grown."""
        try:
            size = run.folder.metrics.stat().st_size
        except FileNotFoundError:
            return False
        if size == run.size:
            return False
        run.size, run.lines = size, [*run.folder.epochs()]
        return True

    def _ending(self, run: _Run, status: int) -> Outcome:
        told = read_ending(run.folder.path, self._objective)
        if told is not None:
            return told
        if status < 0:
            why = " (often for want of memory)" if status == -9 else ""
            return Outcome(ending="failed", reason=f"its process was ended by signal {-status}{why}")
        return Outcome(ending="failed", reason=f"its process ended with status {status}; see log.txt in its folder")

    def _settle(self, slot: Slot, source: Source, outcome: Outcome) -> None:
        run = self._runs.pop(slot)
        self._idle_until.clear()
        try:
            outcome = source.finish(run.job, outcome, run.process.seconds)
        finally:
            run.process.end()
            self._tell(run, outcome.ending, outcome)

    def _interrupt(self, source: Source, reason: str) -> None:
        for slot in [*self._runs]:
            self._runs[slot].process.end()
            self._settle(slot, source, Outcome(ending="interrupted", reason=reason))

    def _tell(self, run: _Run, state: Any, outcome: Outcome | None = None) -> None:
        reached = self._objective.value(run.lines) if outcome is None or outcome.value is None else outcome.value
        self._show(
            Row(
                key=run.job.key,
                state=state,
                device=run.process.slot.name,
                epoch=int(run.lines[-1]["epoch"]) if run.lines else 0,
                epochs=int(run.lines[-1]["epochs"]) if run.lines else run.epochs,
                ap=reached,
                seconds=run.process.seconds,
                reason=outcome.reason if outcome else "",
            )
        )


def read_ending(folder: Path, objective: Objective) -> Outcome | None:
    """How the run in a folder ended, with its value; None where it has not ended by itself."""
    try:
        told = json.loads((folder / ENDING_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    value = objective.value(RunFolder(path=folder).epochs())
    if told["ending"] == "complete" and value is None:
        return Outcome(ending="failed", reason=f"no epoch was evaluated in time for {objective}; give it longer")
    return Outcome(
        ending=told["ending"],
        value=value if told["ending"] == "complete" else None,
        reason=told["reason"],
        is_mendable=bool(told.get("is_mendable", False)),
    )
