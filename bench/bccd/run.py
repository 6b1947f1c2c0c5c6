"""Seconds per epoch with evaluation on BCCD, ours and the reference's in turn; the last line is JSON."""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from machine import machine

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = ("RBC", "WBC", "Platelets")


def to_yolo(voc: Path, out: Path) -> Path:
    """Lay BCCD out as the reference reads it: links to the images, one text file of boxes each."""
    for split in ("train", "val"):
        (out / "images" / split).mkdir(parents=True)
        (out / "labels" / split).mkdir(parents=True)
        for stem in (voc / "ImageSets" / "Main" / f"{split}.txt").read_text().split():
            (out / "images" / split / f"{stem}.jpg").symlink_to(voc.resolve() / "JPEGImages" / f"{stem}.jpg")
            lines = []
            root = ElementTree.parse(voc / "Annotations" / f"{stem}.xml").getroot()
            width, height = (float(root.findtext(f"size/{side}", "0")) for side in ("width", "height"))
            for entry in root.iter("object"):
                x1, y1, x2, y2 = (
                    float(entry.findtext(f"bndbox/{side}", "0")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                if x2 > x1 and y2 > y1:
                    box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
                    label = NAMES.index(entry.findtext("name", ""))
                    lines.append(f"{label} " + " ".join(f"{value:.6f}" for value in box))
            (out / "labels" / split / f"{stem}.txt").write_text("\n".join(lines))
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(NAMES))
    (out / "data.yaml").write_text(f"path: {out}\ntrain: images/train\nval: images/val\nnames:\n{names}\n")
    return out / "data.yaml"


def ours(data: Path, epochs: int, out: Path) -> list[float]:
    """Seconds of each epoch of a run of ours."""
    command = [
        sys.executable, "-m", "paceline", "train", f"data={data}", "model=yolo11n", "imgsz=320", "batch=16",
        f"epochs={epochs}", "plots=False", "close_mosaic=0", f"project={out}", "name=ours",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = (json.loads(line) for line in (out / "ours" / "metrics.jsonl").read_text().splitlines())
    return [line["wall_s"] for line in lines if line["kind"] == "epoch"]


def theirs(python: Path, data_yaml: Path, epochs: int, out: Path) -> list[float]:
    """Seconds of each epoch of a run of the reference."""
    script = REPOSITORY / "bench" / "peer" / "peer_train.py"
    command = [
        str(python), str(script), str(data_yaml), "yolo11n", "320", str(epochs), "16", str(out), "close_mosaic=0",
        "cache=ram", f"workers={os.cpu_count()}",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with (out / "run" / "results.csv").open() as stream:
        ends = [float(row["time"]) for row in csv.DictReader(stream, skipinitialspace=True)]
    return [end - start for start, end in zip([0.0, *ends], ends, strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "bccd_voc")
    parser.add_argument("--peer", type=Path, default=REPOSITORY / "build" / "peer", help="environment of the reference")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    if not options.data.is_dir():
        sys.exit(f"{options.data} does not exist; name the folder of BCCD with --data.")
    python = options.peer / "bin" / "python"
    if not python.exists():
        subprocess.run(["bash", str(REPOSITORY / "bench" / "peer" / "peer_env.sh"), str(options.peer)], check=True)
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    with tempfile.TemporaryDirectory() as folder:
        data_yaml = to_yolo(options.data, Path(folder) / "yolo")
        for number in range(options.rounds):
            out = Path(folder) / str(number)
            seconds["ours"] += ours(options.data, options.epochs, out)[1:]
            seconds["theirs"] += theirs(python, data_yaml, options.epochs, out / "theirs")[1:]
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{'':8} {'s/epoch':>8} {'least':>8} {'most':>8}")
    for name, values in seconds.items():
        print(f"{name:8} {medians[name]:8.1f} {min(values):8.1f} {max(values):8.1f}")
    result = {
        "time_ratio": round(medians["ours"] / medians["theirs"], 3),
        "ours_s_per_epoch": round(medians["ours"], 2),
        "theirs_s_per_epoch": round(medians["theirs"], 2),
        "epochs_each": len(seconds["ours"]),
    }
    (REPOSITORY / "bench" / "results").mkdir(exist_ok=True)
    record = result | {"seconds": seconds, "machine": machine()}
    (REPOSITORY / "bench" / "results" / "bccd_time.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
