"""Trains with Paceline and writes the clock's time of every step and epoch: ours_train.py DATA OUT [key=value ...]."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from paceline import YOLO
from paceline.callbacks import Callback

if TYPE_CHECKING:
    from paceline.records import EpochRecord, StepRecord


class Events(Callback):
    """Writes a line of JSON for each."""

    def __init__(self, file: Path) -> None:
        self._stream = file.open("a", buffering=1)

    def tell(self, kind: str, **values: object) -> None:
        """Write an event with the clock's time."""
        self._stream.write(json.dumps({"kind": kind, "time": time.time(), "standin_s": 0.0} | values) + "\n")

    def on_step(self, record: StepRecord) -> None:
        """After every step."""
        self.tell("step")

    def on_epoch(self, record: EpochRecord) -> None:
        """After every epoch."""
        self.tell("epoch", epoch=record.epoch, ap=record.evaluation.ap if record.evaluation else None)


def main() -> None:
    data, out = sys.argv[1], Path(sys.argv[2])
    options = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in sys.argv[3:])}
    out.mkdir(parents=True, exist_ok=True)
    events = Events(out / "events.jsonl")
    network = YOLO(options.pop("model"))
    network.train(data=data, project=str(out), name="run", exist_ok=True, callbacks=[events], **options)
    events.tell("end")


if __name__ == "__main__":
    main()
