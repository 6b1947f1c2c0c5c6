"""Data sets as the reference reads them: links to the images, one text file of boxes each."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    return _data_yaml(out, NAMES)


def coco_to_yolo(train: Path, val: Path, out: Path) -> Path:
    """Lay two COCO folders of the same classes out as train and val; crowds are left out. Returns its data.yaml."""
    if (out / "data.yaml").exists():
        return out / "data.yaml"
    names: list[str] = []
    for split, folder in (("train", train), ("val", val)):
        content = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
        categories = sorted(content["categories"], key=lambda category: category["id"])
        label_of = {category["id"]: label for label, category in enumerate(categories)}
        names = [category["name"] for category in categories]
        lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        size_of = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
        for entry in content["annotations"]:
            if not entry.get("iscrowd"):
                width, height = size_of[entry["image_id"]]
                left, top, across, down = entry["bbox"]
                box = ((left + across / 2) / width, (top + down / 2) / height, across / width, down / height)
                words = " ".join(f"{value:.6f}" for value in box)
                lines[entry["image_id"]].append(f"{label_of[entry['category_id']]} {words}")
        for kind in ("images", "labels"):
            (out / kind / split).mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            link = out / "images" / split / Path(image["file_name"]).name
            if not link.is_symlink():
                link.symlink_to((folder / "images" / image["file_name"]).resolve())
            (out / "labels" / split / f"{link.stem}.txt").write_text("\n".join(lines[image["id"]]))
    return _data_yaml(out, names)


def _data_yaml(out: Path, names: Sequence[str]) -> Path:
    """Write it last: it says that the folder is whole."""
    listed = "\n".join(f"  {number}: {json.dumps(name)}" for number, name in enumerate(names))
    (out / "data.yaml").write_text(f"path: {out}\ntrain: images/train\nval: images/val\nnames:\n{listed}\n")
    return out / "data.yaml"
