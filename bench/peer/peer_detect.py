"""Detections of saved weights of the reference on its val split: peer_detect.py data.yaml IMGSZ BATCH OUT WEIGHTS...

Writes OUT/NAME.json for each file of weights: a list of image_id (name without its ending), category_id, bbox (left,
top, width, height in pixels of the file) and score, as the reference's own validation saves it.
"""

import shutil
import sys
from pathlib import Path

from ultralytics import YOLO

data, imgsz, batch, out = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
out.mkdir(parents=True, exist_ok=True)
for weights in map(Path, sys.argv[5:]):
    folder = out / f"{weights.stem}.val"
    YOLO(weights).val(
        data=data, imgsz=imgsz, batch=batch, device="cpu", save_json=True, plots=False, verbose=False,
        project=str(out), name=folder.name, exist_ok=True,
    )  # fmt: skip
    shutil.copy(folder / "predictions.json", out / f"{weights.stem}.json")
