"""Trains the reference from scratch, as a baseline. Run it with the peer environment.

Usage: DIR/bin/python peer_train.py data.yaml MODEL(yolo11n) IMGSZ EPOCHS BATCH OUT_FOLDER [device=cpu] [key=value ...]
Prints nothing of its own: read OUT_FOLDER/run/results.csv (epoch, time in s since the start, losses, AP50, AP50-95).
"""

import ast
import sys

from ultralytics import YOLO


def literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


data, model, imgsz, epochs, batch, out = sys.argv[1:7]
more = {key: literal(value) for key, _, value in (word.partition("=") for word in sys.argv[7:])}
YOLO(f"{model}.yaml").train(
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
