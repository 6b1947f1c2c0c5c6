"""Source: finds out which format a data set has, by what it is."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.data.formats.coco import CocoSource
from paceline.data.formats.voc import VocSource
from paceline.data.formats.yaml_file import read_yaml
from paceline.data.formats.yolo import YoloSource, label_path
from paceline.data.headers import IMAGE_SUFFIXES
from paceline.data.near_names import no_such_path
from paceline.data.pack.reader import Pack, is_pack
from paceline.data.pack.source import PackSource
from paceline.data.stamps import walk
from paceline.errors import UserError

if TYPE_CHECKING:
    from paceline.data.scan import Source

SHAPES = "shapes"
"""Name of the set that comes with the package; a folder of this name is `./shapes`."""

_SETS_ELSEWHERE = re.compile(
    "african-wildlife|argoverse|brain-tumor|coco(8|128)?(-grayscale|-multispectral|-pose|-seg)?|construction-ppe|"
    "crack-seg|dota8|dotav1|globalwheat2020|homeobjects-3k|kitti|lvis|medical-pills|objects365|open-images-v7|"
    "package-seg|signature|sku-110k|tt100k|visdrone|voc|xview"
)
"""Names, in lower case, of data sets that other YOLO trainers fetch by themselves."""
_NO_DOWNLOAD = (
    "data sets are not downloaded, so name the yaml, COCO JSON or folder of a copy that you have, or try "
    f"data={SHAPES}, which is made here"
)

_ARCHIVES = frozenset({".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"})


def recognise(data: str, cache_folder: Path | None = None) -> Source:
    """Return the source that `data` names: `shapes`, a yaml or JSON file, a pack or the address of one, or a folder.

    Raises UserError where it does not exist or is nothing that can be trained on.
    """
    if data == SHAPES:
        from paceline.data import shapes

        return YoloSource.open(shapes.ensure(cache_folder))
    if not data.strip():
        raise UserError("No data set is named; pass one, such as `data=shapes` or `data=path/to/data.yaml`.")
    if "://" in data:
        from paceline.data.pack.remote import open_remote

        return PackSource(pack=open_remote(data, cache_folder))
    path = Path(os.path.abspath(os.path.expanduser(data)))
    if not path.exists():
        is_known = _SETS_ELSEWHERE.fullmatch(path.stem.lower())
        raise no_such_path(os.path.expanduser(data), extra=(SHAPES,), mend=_NO_DOWNLOAD if is_known else "correct it")
    return _of_folder(path) if path.is_dir() else _of_file(path, cache_folder)


def _of_file(path: Path, cache_folder: Path | None = None) -> Source:
    """Recognise a file."""
    suffix = path.suffix.lower()
    if suffix in (".yaml", ".yml"):
        content = read_yaml(path)
        return CocoSource.of_yaml(path, content) or YoloSource.open(path, content)
    if suffix == ".json":
        return CocoSource.of_json(path)
    if suffix in _ARCHIVES:
        raise UserError(f"{path} is an archive; unpack it and name the folder.")
    if is_pack(path):
        return PackSource(pack=Pack.open(path, cache_folder))
    raise UserError(f"{path} is no data set; name a data.yaml, a COCO JSON file, a pack, or the folder of the set.")


def _of_folder(folder: Path) -> Source:
    """Recognise a folder: its `data.yaml`, else Pascal VOC, else COCO, else its only yaml file."""
    yamls = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".yaml", ".yml"))
    named = [path for path in yamls if path.stem.lower() in ("data", "dataset")]
    if len(named) == 1:
        return _of_file(named[0])
    source = VocSource.recognise(folder) or CocoSource.recognise(folder)
    if source:
        return source
    if len(yamls) == 1:
        return _of_file(yamls[0])
    if yamls:
        raise UserError(
            f"{folder} holds several yaml files ({', '.join(path.name for path in yamls[:5])}); name one as the data."
        )
    inner = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and not entry.name.startswith(".")]
    if len(inner) == 1 and not any(entry.is_file() for entry in folder.iterdir()):
        return _of_folder(inner[0])
    images = _labelled_images(folder)
    if images is not None:
        raise UserError(
            f"{folder} holds YOLO labels, but no data.yaml that says what they mean; write one there, with the lines "
            f"`train: {images}`, `val: ...` (or none: a tenth is held back) and `names: [cat, dog]`."
        )
    raise UserError(
        f"{folder} is no data set that is known: it has no data.yaml (YOLO), no annotations/instances_train*.json "
        "(COCO), and no JPEGImages and Annotations (Pascal VOC); add one of these, or name another folder."
    )


def _labelled_images(folder: Path) -> str | None:
    """Return the folder of images, from `folder`, of which any has a label file where YOLO has it."""
    for name in ("train/images", "images/train", "train", "images", "."):
        images = walk(str(folder / name), IMAGE_SUFFIXES, deep=False) if (folder / name).is_dir() else {}
        if any(os.path.isfile(label_path(image)) for image in images):
            return name
    return None
