"""The three sets, laid out as the reference reads them: YOLO text, an absolute path, a number of images that suits."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True, kw_only=True)
class BenchSet:
    """One row of the table."""

    name: str
    source: str
    """Folder below the data folder."""
    imgsz: int
    repeats: int
    """How often each image is there, under names of its own."""
    most: int
    """Images to use at most, repeats included."""


SETS = (
    BenchSet(name="coco33", source="coco33", imgsz=640, repeats=8, most=264),
    BenchSet(name="bccd", source="bccd_voc", imgsz=320, repeats=1, most=205),
    BenchSet(name="deeppcb", source="deeppcb_yolo", imgsz=640, repeats=1, most=400),
)


def lay_out(chosen: BenchSet, data: Path, out: Path) -> Path:
    """Write the training images of a set as real files with YOLO labels below `out`; returns the data.yaml."""
    whole = out / "whole"
    command = [sys.executable, "-m", "paceline", "data", "convert", str(data / chosen.source), str(whole)]
    subprocess.run([*command, "--format", "yolo"], check=True, stdout=subprocess.DEVNULL)
    content = yaml.safe_load((whole / "data.yaml").read_text())
    images = sorted(path for path in (whole / content["train"]).rglob("*") if path.is_file())
    for folder in ("images", "labels"):
        (out / folder / "train").mkdir(parents=True)
    number = 0
    for repeat in range(chosen.repeats):
        for image in images:
            if number == chosen.most:
                break
            labels = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt")
            stem = f"{image.stem}-{repeat}-{number:05d}"
            (out / "images" / "train" / f"{stem}{image.suffix}").write_bytes(image.read_bytes())
            text = labels.read_bytes() if labels.exists() else b""
            (out / "labels" / "train" / f"{stem}.txt").write_bytes(text)
            number += 1
    described = {"path": str(out), "train": "images/train", "val": "images/train", "names": content["names"]}
    (out / "data.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    return out / "data.yaml"
