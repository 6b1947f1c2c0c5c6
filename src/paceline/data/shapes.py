"""Shapes: the embedded data set, generated once into the cache folder as a YOLO data set.

```
shapes-v1/
  data.yaml
  images/train/00000.jpg ...   images/val/00000.jpg ...
  labels/train/00000.txt ...   labels/val/00000.txt ...
  complete.json                written last: the recipe, and how many files of how many bytes there are
```
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import cv2

from paceline.data.cache_folder import cache_folder
from paceline.data.scenes.draws import Draws
from paceline.data.scenes.outline import CLASS_NAMES
from paceline.data.scenes.scene import SceneConfig, draw_scene
from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.data.scenes.scene import Scene

VERSION = 1
"""Goes up whenever the same recipe would give other pictures."""
MARKER = "complete.json"


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """The recipe of the set; a set of another recipe is made anew."""

    train: int = 768
    """Training images."""
    val: int = 128
    """Validation images."""
    quality: int = 92
    """JPEG quality."""
    scene: SceneConfig = field(default_factory=SceneConfig)
    """How hard the pictures are."""


def ensure(folder: Path | None = None, config: ShapesConfig | None = None) -> Path:
    """Return the `data.yaml` of the set inside `folder` (the cache folder if None), making the set if need be.

    A set that is not whole, or was made by another recipe, is replaced. Several processes may call this at once: each
    one that finds no set makes its own, and the first to finish gives it its name. Raises UserError when the folder
    cannot be written.
    """
    config = config or ShapesConfig()
    home = folder or cache_folder()
    target = home / f"shapes-v{VERSION}"
    if _is_whole(target, config):
        return target / "data.yaml"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=f".{target.name}-") as scratch:
            made = Path(scratch, target.name)
            _generate(made, config)
            _put_in_place(made, target, Path(scratch, "replaced"), config)
    except OSError as error:
        raise UserError(
            f"Cannot write the data set `shapes` into {home}: {error.strerror or error}; free some space, "
            "or set PACELINE_CACHE to a folder that can be written."
        ) from error
    return target / "data.yaml"


def _put_in_place(made: Path, target: Path, replaced: Path, config: ShapesConfig) -> None:
    """Give a finished set its name, unless another process has just done so; a broken set is moved to `replaced`."""
    if not _is_whole(target, config):
        with contextlib.suppress(FileNotFoundError):
            target.rename(replaced)
    try:
        made.rename(target)
    except OSError:
        if not _is_whole(target, config):
            raise


def _generate(folder: Path, config: ShapesConfig) -> None:
    """Write the whole set, the marker last."""
    splits = {"train": config.train, "val": config.val}
    for split in splits:
        (folder / "images" / split).mkdir(parents=True)
        (folder / "labels" / split).mkdir(parents=True)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as threads:
        jobs = [
            threads.submit(_write_scene, folder, split, number, config)
            for split, count in splits.items()
            for number in range(count)
        ]
        for job in jobs:
            job.result()
    names = "\n".join(f"  {number}: {name}" for number, name in enumerate(CLASS_NAMES))
    (folder / "data.yaml").write_text(f"train: images/train\nval: images/val\nnames:\n{names}\n", encoding="utf-8")
    (folder / MARKER).write_text(json.dumps(_summary(folder, config), indent=1), encoding="utf-8")


def _write_scene(folder: Path, split: str, number: int, config: ShapesConfig) -> None:
    """Make one picture and its label file; they hang on the version, the split and the number alone."""
    scene = draw_scene(config.scene, Draws(VERSION, number if split == "train" else 2**32 + number))
    encoded, jpeg = cv2.imencode(".jpg", scene.image, [cv2.IMWRITE_JPEG_QUALITY, config.quality])
    assert encoded
    (folder / "images" / split / f"{number:05d}.jpg").write_bytes(jpeg.tobytes())
    (folder / "labels" / split / f"{number:05d}.txt").write_text(_label_lines(scene), encoding="utf-8")


def _label_lines(scene: Scene) -> str:
    """Return the YOLO label file: class, then centre, width and height as shares of the image."""
    height, width = scene.image.shape[:2]
    lines = []
    for label, (x1, y1, x2, y2) in zip(scene.labels, scene.boxes.tolist(), strict=True):
        centre = f"{(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
        lines.append(f"{label} {centre} {(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}\n")
    return "".join(lines)


def _summary(folder: Path, config: ShapesConfig) -> dict[str, object]:
    """Return the recipe and, per folder, the number of files and their bytes."""
    contents = {}
    for part in ("images/train", "images/val", "labels/train", "labels/val"):
        sizes = [entry.stat().st_size for entry in os.scandir(folder / part) if entry.name.endswith((".jpg", ".txt"))]
        contents[part] = [len(sizes), sum(sizes)]
    return {"version": VERSION, "recipe": json.loads(json.dumps(asdict(config))), "contents": contents}


def _is_whole(folder: Path, config: ShapesConfig) -> bool:
    """Tell whether the set is there, of this recipe, with every file that its marker counted."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return bool((folder / "data.yaml").stat().st_size) and marker == _summary(folder, config)
    except (OSError, ValueError):
        return False
