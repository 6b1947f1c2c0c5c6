"""The help of a command: drawn by tyro from the same dataclasses that hold the options, grouped by room."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from paceline.options import Options

_ABOUT = {
    "train": "Train a detector: paceline train data=path/to/data.yaml model=yolo11n epochs=100",
    "val": "Score trained weights: paceline val model=runs/train data=path/to/data.yaml",
    "predict": "Find objects in images: paceline predict street.jpg photos/ model=runs/train",
    "tune": "Search hyper-parameters, one trial per device: paceline tune data.yaml model=yolo11n epochs=30 trials=40",
    "bench": "Measure how fast a network trains, beside what the device can: paceline bench model=yolo11n batch=16",
    "data check": "Look for mistakes in a data set, file by file: paceline data check path/to/data.yaml",
    "data pack": "Put a data set into one file: paceline data pack path/to/data.yaml set.pack",
    "data convert": "Write a data set in another format: paceline data convert path/to/data.yaml out --format coco",
    "data plot": "Draw classes, box sizes and places: paceline data plot path/to/data.yaml plot.png",
}
_SPELLING = """

Write options as imgsz=640, --imgsz 640 or --imgsz=640; - and _ in names are the same, and --cos-lr alone means true.
--config FILE reads options from YAML; those on the command line go before it."""


def print_help(options: type[Options]) -> None:
    """Print every option of a command with its meaning and default."""
    import tyro

    with suppress(SystemExit):  # by which tyro ends after its help
        tyro.cli(
            options,
            prog=f"paceline {options.COMMAND}",
            description=_ABOUT[options.COMMAND] + _SPELLING,
            args=["--help"],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff),
        )
