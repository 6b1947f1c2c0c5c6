"""Conversion: a data set of one format written in another; the folder gets its name when it is whole."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from paceline.data.convert.coco import write_coco
from paceline.data.convert.images import ImageFiles, require_convertible
from paceline.data.convert.losses import losses, require_names
from paceline.data.convert.voc import write_voc
from paceline.data.convert.yolo import write_yolo
from paceline.data.headers import BadImage
from paceline.data.pack.writer import PackConfig, write_pack
from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable

    from paceline.data.pack.writer import Progress
    from paceline.data.whole_set import WholeSet

log = logging.getLogger("paceline")

Format = Literal["yolo", "coco", "voc", "pack"]
_WRITERS = {"yolo": write_yolo, "coco": write_coco, "voc": write_voc}
_AT_A_TIME = 4096
_TITLES = {"yolo": "YOLO", "coco": "COCO", "voc": "Pascal VOC", "pack": "A pack"}


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """How a data set is converted."""

    format: Format
    strict: bool = False
    """Refuse what the format cannot hold, instead of dropping it with a warning."""
    link: bool = False
    """Link images instead of copying them, where the file system can."""


def convert(data: WholeSet, out: Path, config: ConvertConfig, progress: Progress | None = None) -> None:
    """Write all splits of a data set into the new folder (for `pack`: the file) `out`.

    What the format cannot hold is counted in the log before it is dropped. Raises UserError, and leaves nothing behind,
    where `out` is there already, an image cannot be read any more, the disk is full, or `strict` forbids a loss.
    """
    indexes = data.splits
    for index in indexes.values():
        require_convertible(index, link=config.link)
    require_names(config.format, data.names)
    lost = losses(config.format, indexes.values())
    if lost and config.strict:
        raise UserError(
            f"{_TITLES[config.format]} cannot hold everything of {data.source}: {', '.join(lost)}; choose another "
            "format, or leave out strict to drop these."
        )
    if lost:
        log.warning("%s cannot hold everything of %s: %s.", _TITLES[config.format], data.source, ", ".join(lost))
    if config.format == "pack":
        if config.link:
            raise UserError("A pack holds its images itself, so that none can be linked; leave out link.")
        write_pack(indexes, out, made_from=data.format, config=PackConfig(), progress=progress)
        return
    splits = {split: ImageFiles(index, link=config.link) for split, index in indexes.items()}
    counter = _Counter(progress, sum(len(index) for index in indexes.values()))
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"{out} is there already; choose a new folder, or remove it.")
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
        try:
            with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
                _WRITERS[config.format](scratch, splits, lambda number, work: counter.run(pool, number, work))
            os.chmod(scratch, 0o755)
            os.replace(scratch, out)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    except BadImage as error:
        raise UserError(f"{data.source}: {error}; restore the image, or take it out of the data set.") from error
    except OSError as error:
        raise UserError(
            f"Cannot write {out}: {error.strerror or error}; free some space, or choose another place."
        ) from error


class _Counter:
    """Runs work on threads and counts what is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def run(self, pool: ThreadPoolExecutor, number: int, work: Callable[[int], None]) -> None:
        """Call `work` for every number below `number`; the first error comes out, and ends the rest."""
        for start in range(0, number, _AT_A_TIME):
            for _ in pool.map(work, range(start, min(start + _AT_A_TIME, number))):
                self._done += 1
                if self._progress:
                    self._progress(self._done, self._total)
