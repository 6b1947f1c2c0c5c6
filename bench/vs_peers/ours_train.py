"""Trains with Paceline and writes the clock's time of every step and epoch: ours_train.py DATA OUT [key=value ...]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paceline import YOLO
from paceline.callbacks import Callback

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "peer"))
from events import Events

if TYPE_CHECKING:
    from paceline.records import EpochRecord, RunRecord, StepRecord


class Told(Callback):
    """Tells of each."""

    def __init__(self, events: Events) -> None:
        self._events = events

    def on_start(self, record: RunRecord) -> None:
        """When it has been chosen how steps are taken."""
        self._events.tell("start", step=record.step, precision=record.precision)

    def on_step(self, record: StepRecord) -> None:
        """After every step."""
        self._events.step()

    def on_epoch(self, record: EpochRecord) -> None:
        """After every epoch."""
        self._events.epoch(record.epoch, record.evaluation.ap if record.evaluation else None)


def main() -> None:
    data, out = sys.argv[1], Path(sys.argv[2])
    options = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
    events = Events(out / "events.jsonl")
    network = YOLO(options.pop("model"))
    network.train(data=data, project=str(out), name="run", exist_ok=True, callbacks=[Told(events)], **options)
    events.tell("end")


if __name__ == "__main__":
    main()
