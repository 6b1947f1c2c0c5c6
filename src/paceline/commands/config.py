"""What a user may set about validation and prediction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ValConfig:
    """What is evaluated, and what is written about it."""

    data: str = ""
    """Data set, as for training; empty takes the one that the weights were trained on."""
    split: Literal["val", "test", "train"] = "val"
    """Part of the data set to evaluate."""
    imgsz: int = 0
    """Side of the network's square input, in pixels; 0 takes that of the weights."""
    batch: int = 16
    """Images per step."""
    workers: int = -1
    """Loader threads; -1 takes one per core, 8 at most."""
    rect: bool = False
    """Evaluate in rectangles that hold the images with little grey, instead of squares."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or the number of a GPU."""
    single_cls: bool = False
    """Treat all classes as one."""
    classes: tuple[int, ...] = ()
    """Only evaluate these classes; empty means all."""
    plots: bool = True
    """Draw the confusion matrix, curves and predictions beside truths."""
    save_json: bool = False
    """Write the detections in COCO's results format."""
    verbose: bool = True
    """Print the figures of each class beside those of all; a call in Python prints none."""


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """What is looked at, and what is written about it."""

    source: tuple[str, ...] = ()
    """Image files, folders, patterns such as `street/*.jpg`, or a text file with one of these per line."""
    imgsz: int = 0
    """Side of the network's square input, in pixels; 0 takes that of the weights."""
    batch: int = 16
    """Images per step."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, or the number of a GPU."""
    classes: tuple[int, ...] = ()
    """Only report these classes; empty means all."""
    save: bool = True
    """Write each picture with its boxes."""
    save_txt: bool = False
    """Write a YOLO label file per picture."""
    save_conf: bool = False
    """Add the score as a sixth column to these label files."""
    save_json: bool = False
    """Write all detections into `predictions.json`."""
    show_conf: bool = True
    """Write the score beside each box."""
    verbose: bool = True
    """Print a line for each picture; a call in Python prints none."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What is measured, for how long, and where it is written."""

    data: str = ""
    """Also measure the loader alone and the training end to end on this data set, and take the step's batch from it."""
    imgsz: int = 640
    """Side of the network's square input, in pixels; a multiple of 32."""
    batch: int = 16
    """Images per step over all devices."""
    num_classes: int = 0
    """Classes of the network; 0 takes those of the data set or of the weights, or else 80."""
    workers: int = -1
    """Loader threads; -1 takes one per core, 8 at most."""
    cache: Literal["auto", "none", "ram", "disk", "device"] = "auto"
    """Keep decoded images in memory, in a file, or on the GPU, as for training."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, the number of a GPU, or several (`0,1`): one process on each."""
    devices: int = 0
    """Devices to measure together, one process each; 0 takes those that `device` names."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; `auto` takes the fastest of those that the device has, see `tune_step`."""
    tune_step: Literal["off", "quick", "full"] = "quick"
    """How the step is carried out is chosen as for a long training: `quick`, `full` (also compiled, and as a graph on
    GPUs) or `off`, the defaults."""
    seconds: float = 10.0
    """How long the step is timed; the loader, the whole and the evaluation take as long each."""
    json: str = ""
    """File to write the figures into."""
    compare: str = ""
    """File of an earlier bench, whose figures are printed beside the new ones."""
