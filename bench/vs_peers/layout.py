"""BCCD as the reference reads it."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

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
