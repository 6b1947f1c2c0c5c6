"""Trains the reference from scratch, as a baseline. Run it with the peer environment.

Usage: DIR/bin/python peer_train.py data.yaml MODEL(yolo11n) IMGSZ EPOCHS BATCH OUT_FOLDER [device=cpu] [key=value ...]
Writes OUT_FOLDER/events.jsonl: every step and epoch with the clock's time, the AP50-95 as it reports it, and the
seconds spent so far in the stand-in for torchvision, if there is one. Weights are in OUT_FOLDER/run/weights.
"""

import ast
import json
import sys
import time
from pathlib import Path


def literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


data, model, imgsz, epochs, batch, out = sys.argv[1:7]
more = {key: literal(value) for key, _, value in (word.partition("=") for word in sys.argv[7:])}
Path(out).mkdir(parents=True, exist_ok=True)
events = (Path(out) / "events.jsonl").open("a", buffering=1)

from ultralytics import YOLO  # noqa: E402


def standin_seconds() -> float:
    ops = sys.modules.get("torchvision.ops")
    return getattr(ops, "seconds", 0.0)


def tell(kind: str, **values: object) -> None:
    events.write(json.dumps({"kind": kind, "time": time.time(), "standin_s": standin_seconds()} | values) + "\n")


def on_epoch(trainer: object) -> None:
    ap = {key: float(value) for key, value in trainer.metrics.items() if "mAP50-95" in key}  # type: ignore[attr-defined]
    tell("epoch", epoch=trainer.epoch + 1, ap=next(iter(ap.values()), None))  # type: ignore[attr-defined]


network = YOLO(f"{model}.yaml")
network.add_callback("on_train_batch_end", lambda trainer: tell("step"))
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
tell("end")
