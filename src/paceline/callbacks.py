"""Callbacks: what a user's own code is told while a run goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.records import EndRecord, EpochRecord, EvaluationRecord, RunRecord, StepRecord


class Callback(Protocol):
    """Derive from this class and override what you need; every method receives one immutable record.

    Methods are called on the main thread, in the order of the list that was given to `train`; an exception in one
    ends the run like any other error.
    """

    def on_start(self, record: RunRecord) -> None:
        """Before the first step, when the data, the network and the run folder stand."""

    def on_step(self, record: StepRecord) -> None:
        """After every step; losses are filled in only where the device has been read anyway."""

    def on_evaluation(self, epoch: int, record: EvaluationRecord) -> None:
        """After every evaluation; with `val_async`, when its figures are taken in, at the end of a later epoch."""

    def on_epoch(self, record: EpochRecord) -> None:
        """After every epoch and its evaluation; its checkpoint may still be on its way to the disk.

        The files of the epoch before are there, and after the last epoch its own.
        """

    def on_end(self, record: EndRecord) -> None:
        """After the last epoch, when all files are written."""


_METHODS = ("on_start", "on_step", "on_evaluation", "on_epoch", "on_end")


def require_callbacks(callbacks: object) -> None:
    """Raise UserError unless this is a list of callbacks; functions, which other trainers take, are none."""
    is_list = isinstance(callbacks, list | tuple)
    for entry in callbacks if isinstance(callbacks, list | tuple) else (callbacks,):
        has_all = all(callable(getattr(entry, name, None)) for name in _METHODS)
        if isinstance(entry, type) or not has_all or not is_list:
            what = repr(entry) if isinstance(entry, str) else getattr(entry, "__name__", type(entry).__name__)
            raise UserError(
                f"callbacks={what} is no list of callbacks; derive a class from paceline.callbacks.Callback, and pass "
                "callbacks=[Watch()] where Watch is its name."
            )
