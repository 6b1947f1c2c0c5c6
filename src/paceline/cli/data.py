"""`paceline data`: what is in a data set, what is wrong with it, and the same set as a pack or in another format."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.cli.argv import sort_words
from paceline.cli.bar import image_bar
from paceline.cli.console import ConsoleHandler, logging_to
from paceline.cli.help import print_help
from paceline.cli.runs import read_options
from paceline.cli.wording import plural
from paceline.errors import UserError
from paceline.options import DataCheckOptions, DataConvertOptions, DataPackOptions, DataPlotOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.data.check import CheckReport

_HELP = """\
usage: paceline data check DATA [--plot FILE]
       paceline data plot DATA FILE
       paceline data pack DATA OUT [--decoded] [--imgsz N] [--splits train val]
       paceline data convert DATA OUT --format yolo|coco|voc|pack [--strict] [--link]

check   report what is wrong, file by file, and what is in the set
plot    draw its classes, box sizes and places
pack    put images and labels into one checksummed file to train from
convert write the set in another format
"""


def run_data(words: Sequence[str]) -> int:
    """Run the command that the first word names."""
    if not words or words[0] in {"-h", "--help"}:
        print(_HELP, end="")
        return 0
    commands = {"check": run_check, "plot": run_plot, "pack": run_pack, "convert": run_convert}
    if words[0] in commands:
        return commands[words[0]](words[1:])
    close = difflib.get_close_matches(words[0], commands, n=1, cutoff=0.5)
    mend = f"did you mean {close[0]}?" if close else f"write `paceline data check {words[0]}` to check a data set."
    raise UserError(f"There is no command data {words[0]}; {mend}")


def run_check(arguments: Sequence[str]) -> int:
    """Print the report; the status is 2 where no training could start."""
    words = sort_words(DataCheckOptions, arguments)
    if words.help:
        print_help(DataCheckOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(DataCheckOptions, words)
        report = _checked(options.data, "check")
        print(report.format_text())
        if options.plot:
            _draw(report, Path(options.plot))
    return 0 if report.usable else 2


def run_plot(arguments: Sequence[str]) -> int:
    """Draw the data set."""
    words = sort_words(DataPlotOptions, arguments)
    if words.help:
        print_help(DataPlotOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(DataPlotOptions, words)
        _draw(_checked(options.data, "plot"), Path(options.file))
    return 0


def run_pack(arguments: Sequence[str]) -> int:
    """Pack a data set."""
    words = sort_words(DataPackOptions, arguments)
    if words.help:
        print_help(DataPackOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(DataPackOptions, words)

        from paceline.data.pack.writer import PackConfig, write_pack
        from paceline.data.whole_set import open_whole_set

        _require_both(options.data, options.out, "pack", "set.pack")
        splits = [name for text in options.splits for name in text.replace(",", " ").split()]
        config = PackConfig(decoded=options.decoded, imgsz=options.imgsz)
        data, out = open_whole_set(options.data, splits=splits), Path(options.out).expanduser()
        with image_bar("packing") as progress:
            report = write_pack(data.splits, out, made_from=data.format, config=config, progress=progress)
        print(
            f"{out}: {plural(report.num_images, 'image')} ({', '.join(data.splits)}), "
            f"{plural(report.num_boxes, 'box', 'boxes')}, {report.num_bytes / 1e6:,.1f} MB."
        )
    return 0


def run_convert(arguments: Sequence[str]) -> int:
    """Write a data set in another format."""
    words = sort_words(DataConvertOptions, arguments)
    if words.help:
        print_help(DataConvertOptions)
        return 0
    with logging_to(ConsoleHandler()):
        options = read_options(DataConvertOptions, words)

        from paceline.data.convert.conversion import ConvertConfig, convert
        from paceline.data.whole_set import open_whole_set

        _require_both(options.data, options.out, "convert", "out --format coco")
        kind, out = options.format, Path(options.out).expanduser()
        if kind == "auto":
            if out.suffix.lower() != ".pack":
                raise UserError("data convert needs a format; add --format yolo, coco, voc or pack.")
            kind = "pack"
        data = open_whole_set(options.data)
        config = ConvertConfig(format=kind, strict=options.strict, link=options.link)
        with image_bar("writing") as progress:
            convert(data, out, config, progress)
        images = sum(len(index) for index in data.splits.values())
        print(f"{out}: {plural(images, 'image')} ({', '.join(data.splits)}) as {kind}.")
    return 0


def _require_both(data: str, out: str, command: str, example: str) -> None:
    if not data or not out:
        raise UserError(
            f"data {command} needs a data set and where to write: paceline data {command} path/to/data.yaml {example}"
        )


def _checked(data: str, command: str) -> CheckReport:
    from paceline.data.check import check_data
    from paceline.data.config import DataConfig

    if not data:
        raise UserError(f"data {command} needs a data set: paceline data {command} path/to/data.yaml")
    return check_data(DataConfig(data=data))


def _draw(report: CheckReport, path: Path) -> None:
    """Draw the boxes of all splits together."""
    import numpy as np

    from paceline.drawing.dataset import dataset_plot

    labels, boxes, sizes = [], [], []
    for split in report.splits:
        index, targets = split.index, split.index.targets
        corners = np.asarray(index.boxes)[targets]
        height, width = np.asarray(index.sizes, dtype=np.float64)[index.images_of_boxes[targets]].T
        shares = corners / np.stack([width, height, width, height], axis=1)
        low, high = shares[:, :2], shares[:, 2:]
        boxes.append(np.concatenate([(low + high) / 2, high - low], axis=1))
        labels.append(np.asarray(index.labels)[targets])
        sizes.append(np.asarray(index.sizes))
    parts = np.concatenate(labels), np.concatenate(boxes), np.concatenate(sizes)
    dataset_plot(path, *parts, report.names, title="/".join(Path(report.source).parts[-2:]))
    print(f"The plot is in {path}.")
