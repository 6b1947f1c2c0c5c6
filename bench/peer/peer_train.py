"""Trains the reference from scratch, as a baseline. Run it with the peer environment.

Usage: DIR/bin/python peer_train.py data.yaml MODEL(yolo11n) IMGSZ EPOCHS BATCH OUT_FOLDER [device=cpu] [key=value ...]
Writes OUT_FOLDER/events.jsonl: every step and epoch with the clock's time (`events.py`), the AP50-95 as it reports it,
and the seconds spent so far in the stand-in for torchvision, if there is one. Weights are in OUT_FOLDER/run/weights.
"""

import ast
import sys
from pathlib import Path

from events import Events


def literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def standin_seconds() -> float:
    ops = sys.modules.get("torchvision.ops")
    return getattr(ops, "seconds", 0.0)


data, model, imgsz, epochs, batch, out = sys.argv[1:7]
more = {key: literal(value) for key, _, value in (word.partition("=") for word in sys.argv[7:])}
events = Events(Path(out) / "events.jsonl", standin_seconds)

from ultralytics import YOLO  # noqa: E402


def on_epoch(trainer: object) -> None:
    ap = {key: float(value) for key, value in trainer.metrics.items() if "mAP50-95" in key}  # type: ignore[attr-defined]
    events.epoch(trainer.epoch + 1, next(iter(ap.values()), None))  # type: ignore[attr-defined]


network = YOLO(f"{model}.yaml")
network.add_callback("on_train_batch_end", lambda trainer: events.step())
network.add_callback("on_train_epoch_end", lambda trainer: events.trained())
network.add_callback("on_fit_epoch_end", on_epoch)
network.train(
    **{
        "data": data,
        "imgsz": int(imgsz),
        "epochs": int(epochs),
        "batch": int(batch),
        "device": "cpu",
        "pretrained": False,
        "plots": False,
        "patience": 0,
        "project": out,
        "name": "run",
        "exist_ok": True,
        "verbose": False,
    }
    | more
)
events.tell("end")
