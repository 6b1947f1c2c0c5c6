"""A small data set made large: the same images under many names, as links."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def repeated(source: Path, entries: int, folder: Path) -> Path:
    """Lay a COCO folder out again with so many entries, each a link to one of its images; returns the new folder."""
    target = folder / f"{source.name}x{entries}"
    if (target / "instances.json").exists():
        return target
    content = json.loads((source / "instances.json").read_text(encoding="utf-8"))
    annotations: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        annotations.setdefault(annotation["image_id"], []).append(annotation)
    (target / "images").mkdir(parents=True, exist_ok=True)
    images, labels = [], []
    for number in range(entries):
        image = content["images"][number % len(content["images"])]
        name = f"{number:05}-{Path(image['file_name']).name}"
        link = target / "images" / name
        if not link.is_symlink():
            link.symlink_to((source / "images" / image["file_name"]).resolve())
        images.append(image | {"id": number + 1, "file_name": name})
        for annotation in annotations.get(image["id"], ()):
            labels.append(annotation | {"id": len(labels) + 1, "image_id": number + 1})
    whole = json.dumps(content | {"images": images, "annotations": labels})
    (target / "instances.json").write_text(whole, encoding="utf-8")  # last: it says that the folder is whole
    return target
