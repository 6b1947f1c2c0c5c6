"""The arguments of the reference's public documentation, and what becomes of each here. Never imports torch.

The table is about the documented arguments of its modes train, val, predict, tune and benchmark (our `bench`). An
argument is `accepted` (an option of ours has its name and its meaning), `neutral` (taken with the values that change
nothing, answered otherwise), or `answered` (by one sentence). `docs/arguments.md` is `markdown()` of this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from paceline.errors import UserError
from paceline.option_values import plain

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

Command = Literal["train", "val", "predict", "tune", "bench"]
COMMANDS: tuple[Command, ...] = ("train", "val", "predict", "tune", "bench")
_RUNS: tuple[Command, ...] = ("train", "val", "predict")


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One documented argument."""

    name: str
    commands: tuple[Command, ...]
    neutral: tuple[object, ...] | None = None
    """Values that change nothing; None for an accepted argument, empty where every value is answered."""
    sentence: str = ""
    """For an accepted one what differs, if anything; else why not, and what to do instead."""

    @property
    def status(self) -> Literal["accepted", "neutral", "answered"]:
        """What becomes of it."""
        if self.neutral is None:
            return "accepted"
        return "neutral" if self.neutral else "answered"


def _accepted(names: str, *commands: Command, note: str = "") -> tuple[Argument, ...]:
    return tuple(Argument(name=name, commands=commands, sentence=note) for name in names.split())


def _only(names: str, neutral: tuple[object, ...], sentence: str, *commands: Command) -> tuple[Argument, ...]:
    return tuple(Argument(name=name, commands=commands, neutral=neutral, sentence=sentence) for name in names.split())


MEANT = {
    "lr": "lr0",
    "learning_rate": "lr0",
    "weights": "model",
    "dataset": "data",
    "img": "imgsz",
    "img_size": "imgsz",
    "image_size": "imgsz",
    "size": "imgsz",
    "conf_thres": "conf",
    "confidence": "conf",
    "iou_thres": "iou",
    "gpu": "device",
    "gpus": "devices",
    "ngpus": "devices",
    "num_gpus": "devices",
    "val_period": "val_interval",
    "val_every": "val_interval",
    "eval_period": "val_interval",
    "eval_interval": "val_interval",
    "hflip": "fliplr",
    "vflip": "flipud",
    "checkpoint": "model",
    "output": "project",
    "save_dir": "project",
}
"""Names that other trainers have for options; no spelling leads from one to the other."""

_DETECTION_ONLY = "only detection is offered; leave it out"
_NO_VIDEO = "videos and streams are not read; save the frames as pictures and give their folder"

ARGUMENTS: tuple[Argument, ...] = (
    # what is run
    *_only("task", ("detect",), "only detection is offered; leave task out", *_RUNS),
    *_only("mode", ("train",), "name the command first, as in `paceline val ...`; leave mode out", "train"),
    *_only("mode", ("val",), "name the command first, as in `paceline train ...`; leave mode out", "val"),
    *_only("mode", ("predict",), "name the command first, as in `paceline train ...`; leave mode out", "predict"),
    *_only("cfg", (None, ""), "options come from a file by `--config FILE`", *_RUNS),
    *_accepted("model", "train", note="A network's name (`yolo11n`), or weights of ours to start from."),
    *_accepted("model", "val", "predict", note="Weights of ours, or a run folder."),
    # data
    *_accepted("data", "train", note="Also a COCO folder or JSON, a Pascal VOC folder, or `shapes`."),
    *_accepted("data", "val", note="Left out, it is the set that the weights were trained on."),
    *_accepted("split", "val"),
    *_accepted("imgsz", "train", note="One side, a multiple of 32."),
    *_accepted("imgsz", "val", "predict", note="One side, a multiple of 32; left out, it is that of the weights."),
    *_accepted("batch", "train", note="Over all devices; -1 or `auto` measures, and so does a share of free memory."),
    *_accepted("batch", "val", "predict", note="A whole number."),
    *_accepted("workers", "train", "val", note="Threads, not processes; -1 takes one per core, 8 at most."),
    *_accepted("cache", "train", note="`True` or `ram`, `False`, `disk`, `device`, and `auto`, our default."),
    *_accepted("fraction", "train", note="Above 0."),
    *_accepted("single_cls", "train", "val"),
    *_accepted("classes", *_RUNS),
    *_accepted("rect", "train", note="For the evaluation after each epoch; training pictures stay square."),
    *_accepted("rect", "val", note="Off unless asked for; at most six shapes."),
    *_only("rect", (False,), "images are letterboxed to a square to predict; leave rect out", "predict"),
    *_accepted("multi_scale", "train", note="A share of imgsz (true is 0.5); at most five sizes."),
    # length and place of a run
    *_accepted("epochs", "train"),
    *_accepted("time", "train", note="Hours, and also `30m`, `2h` or `90s`; the schedule fits the epochs into it."),
    *_accepted("patience", "train", note="0 never stops early."),
    *_accepted("seed", "train"),
    *_accepted("project", *_RUNS, note="`runs` when left out."),
    *_accepted("name exist_ok", *_RUNS, note="An unnamed run takes the next free number."),
    *_accepted("resume", "train", note="`True` for the newest run, or a run folder."),
    *_accepted("save_period", "train"),
    *_accepted("val", "train", note="The last epoch is always evaluated."),
    *_accepted("plots", "train", "val", note="On unless turned off."),
    *_accepted("device", *COMMANDS, note="`train` takes several GPUs too: `0,1`."),
    *_accepted(
        "amp", "train", note="`True` takes the fastest that was measured (`tune_step`); `bf16` and `fp16` name one."
    ),
    *_accepted("deterministic", "train", note="Off unless asked for: the seed alone fixes order and augmentation."),
    *_accepted("pretrained", "train", note="True or False; weights are named by `model`."),
    *_accepted("freeze", "train", note="The number of first nodes that are not trained; a list is answered."),
    *_only("save", (True,), "the weights of a run are always saved; leave save out", "train"),
    *_only("verbose", (True,), "the log has one line per epoch; leave verbose out", "train"),
    *_accepted("verbose", "val", note="The figures of each class, on the command line; Python prints none."),
    *_accepted("verbose", "predict", note="A line for each picture, on the command line; Python prints none."),
    *_only("profile", (False,), "each epoch's record says where its seconds went; leave profile out", "train"),
    *_only("compile", (False, None), "tune_step=full compiles the step where that pays; leave compile out", "train"),
    *_only("compile", (False, None), "torch.compile is for training here; leave compile out", "val", "predict"),
    *_only(
        "distill_model", (None,), "distillation from another network is not offered; leave distill_model out", "train"
    ),
    *_only("trainer", (None,), "trainers cannot be replaced; pass callbacks=[...] in Python instead", "train"),
    # optimiser and schedule
    *_accepted("optimizer", "train", note="`auto`, `SGD` or `AdamW`; others are answered."),
    *_accepted("lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr cos_lr nbs", "train"),
    *_only("dropout", (0.0,), "dropout is for classifiers, and only detection is offered; leave it out", "train"),
    # loss
    *_accepted("box cls dfl", "train"),
    *_only("cls_pw", (0.0,), "classes are not weighted by how rare they are; leave cls_pw out", "train"),
    *_only("label_smoothing", (0.0,), "targets are already soft in this loss; leave label_smoothing out", "train"),
    *_only("pose", (12.0,), _DETECTION_ONLY, "train"),
    *_only("kobj", (1.0, 2.0), _DETECTION_ONLY, "train"),
    *_only("rle angle", (1.0,), _DETECTION_ONLY, "train"),
    *_only("overlap_mask", (True,), _DETECTION_ONLY, "train"),
    *_only("mask_ratio", (4,), _DETECTION_ONLY, "train"),
    # augmentation
    *_accepted("hsv_h hsv_s hsv_v degrees translate scale shear flipud fliplr mosaic close_mosaic", "train"),
    *_accepted("perspective", "train", note="Bounded where the horizon would come into the picture."),
    *_accepted("bgr mixup", "train"),
    *_accepted("cutmix", "train", note="Of the pictures that mixup leaves alone."),
    *_accepted("copy_paste", "train", note="Where the set has polygons; objects come from another image."),
    *_only("copy_paste_mode", ("flip", "mixup"), "objects come from another image; leave copy_paste_mode out", "train"),
    *_only("auto_augment", ("randaugment", None, ""), "it is for classifiers; leave auto_augment out", "train"),
    *_only("erasing", (0.4, 0.0), "it is for classifiers; leave erasing out", "train"),
    *_only("crop_fraction", (1.0,), "it is for classifiers; leave crop_fraction out", "train"),
    *_only(
        "augmentations",
        (None,),
        "in Python, give `transform=` a function or an Albumentations pipeline; leave augmentations out",
        "train",
    ),
    # detections
    *_accepted("conf", "val", note="0.001 when left out."),
    *_accepted("conf", "predict"),
    *_accepted("iou max_det agnostic_nms", "val", "predict"),
    *_accepted("max_det", "train", note="For the evaluation after each epoch."),
    *_only(
        "end2end", (None, False), "both families of networks need non-maximum suppression; leave end2end out", *_RUNS
    ),
    *_only("augment", (False,), "predictions are made once per image; leave augment out", "val", "predict"),
    *_only("half", (False,), "figures are made in float32, equal on every device; leave half out", "val"),
    *_only("half", (False,), "predictions are made in float32; leave half out", "predict"),
    *_only("dnn", (False,), "our own weights run in PyTorch; leave dnn out", "val"),
    *_only("visualize", (False,), "plots=true draws predictions beside truths; leave visualize out", "val"),
    *_only("visualize", (False,), "features are not drawn; leave visualize out", "predict"),
    *_accepted("save_json", "val", note="COCO's results format."),
    *_only("save_txt save_conf", (False,), "label files are written by `paceline predict`", "val"),
    *_only("save_hybrid", (False,), "labels are never mixed with predictions; leave save_hybrid out", "val"),
    # prediction
    *_accepted("source", "predict", note="Files, folders, patterns, arrays; videos and streams are answered."),
    *_accepted("save", "predict", note="On from the command line, off in Python unless asked for."),
    *_accepted("save_txt save_conf show_conf", "predict"),
    *_only("vid_stride", (1,), _NO_VIDEO, "predict"),
    *_only("stream_buffer save_frames", (False,), _NO_VIDEO, "predict"),
    *_only("stream", (False,), "in Python, `YOLO.stream(source)` gives one result after the other", "predict"),
    *_only("show", (False,), "no windows are opened; save the pictures and look at these", "predict"),
    *_only("save_crop", (False,), "crops are not written; cut them out by `results.boxes.xyxy` in Python", "predict"),
    *_only("show_labels", (True,), "boxes are drawn with their classes; leave show_labels out", "predict"),
    *_only("show_boxes", (True,), "pictures are drawn with their boxes; use save=false to draw none", "predict"),
    *_only("line_width", (None,), "the width of lines follows the size of the picture; leave it out", "predict"),
    *_only("retina_masks", (False,), _DETECTION_ONLY, "predict"),
    *_only("embed", (None,), "feature vectors are not given out; leave embed out", "predict"),
    # searching
    *_only("iterations", (None,), "the number of trials is `trials`; write trials=NUMBER", "tune"),
    *_accepted("space", "tune", note="A YAML file of ranges, see docs/tuning.md; in Python a mapping as well."),
    *_only("use_ray", (False,), "trials run side by side without Ray, one per device; leave use_ray out", "tune"),
    *_only("gpu_per_trial", (None, 1), "each trial has one device; name several by device=0,1", "tune"),
    *_only("grace_period", (None,), "`pruner` says how hopeless trials are ended; leave grace_period out", "tune"),
    # measuring
    *_accepted(
        "model", "bench", note="A network's name, or weights of ours. Training is measured, not export formats."
    ),
    *_accepted("data", "bench", note="Adds the loader alone and the training end to end."),
    *_accepted("imgsz", "bench", note="One side, a multiple of 32."),
    *_only("half", (False,), "the precision is named by amp=bf16 or amp=fp16; leave half out", "bench"),
    *_only("int8", (False,), "training does not compute in int8; leave int8 out", "bench"),
    *_only("verbose", (False,), "the tables say all that was measured; leave verbose out", "bench"),
    *_only("format", (None, ""), "training is measured, not export formats; leave format out", "bench"),
)


def is_neutral(command: str, name: str, value: object) -> bool:
    """Whether `name=value` is an argument of the reference that changes nothing here; False for an unknown name.

    Raises UserError with its sentence for one that is not offered.
    """
    for argument in ARGUMENTS:
        if argument.name != name or not _concerns(argument, command) or argument.neutral is None:
            continue
        if plain(value) in tuple(plain(entry) for entry in argument.neutral):
            return True
        raise UserError(f"{name}={value} is not taken: {argument.sentence}.")
    return False


def find(command: str, name: str) -> Argument | None:
    """Look up an argument of a command; None where the table has no such row."""
    for argument in ARGUMENTS:
        if argument.name == name and _concerns(argument, command):
            return argument
    return None


_EXPORTING = frozenset({"format", "keras", "optimize", "int8", "dynamic", "simplify", "opset", "workspace", "nms"})
_OF_SOME_MODE = frozenset({"tracker", "save_dir"} | _EXPORTING | {argument.name for argument in ARGUMENTS})


def of_this_command(command: str, mapping: Mapping[str, object], own: Container[str]) -> dict[str, object]:
    """Leave out what a file of arguments says about other modes, where it is one that the reference has written.

    Such a file, `args.yaml`, names its task and mode, and every argument of every mode. own: options of the command.
    """
    if not {"task", "mode"} <= mapping.keys():
        return dict(mapping)
    foreign = {name for name in mapping if name in _OF_SOME_MODE and name not in own and find(command, name) is None}
    return {name: value for name, value in mapping.items() if name not in foreign}


def _concerns(argument: Argument, command: str) -> bool:
    """Whether a row is about a command; a search also takes what its trials do."""
    return command in argument.commands or (command == "tune" and "train" in argument.commands)


_BEFORE = {"tune": "Those of train, and:", "bench": "Those of benchmark, which times export formats there:"}


def markdown() -> str:
    """Write the page `docs/arguments.md`."""
    lines = [
        "# Arguments of other YOLO trainers",
        "",
        "Every documented argument of ultralytics' modes train, val, predict, tune and benchmark, and what Paceline",
        "does with it. An argument that Paceline does not have is never passed over in silence: it is taken where its",
        "value changes nothing, and else answered by the sentence below. Names that are in no table are answered with",
        "the closest name that there is. `paceline train --help` lists our own options, which are more than these.",
        "",
        "This page is made from `src/paceline/arguments.py` by `python -m paceline.arguments > docs/arguments.md`;",
        "a test compares the two.",
    ]
    for command in COMMANDS:
        lines += ["", f"## {command}"]
        lines += ["", _BEFORE[command]] if command in _BEFORE else []
        lines += ["", "| argument | here | |", "|---|---|---|"]
        lines += [_row(argument) for argument in ARGUMENTS if command in argument.commands]
    return "\n".join(lines) + "\n"


def _row(argument: Argument) -> str:
    if argument.neutral is None:
        return f"| `{argument.name}` | accepted | {argument.sentence} |"
    shown = " or ".join(f"`{value!r}`" for value in argument.neutral)
    sentence = f"{argument.sentence[0].upper()}{argument.sentence[1:]}."
    return f"| `{argument.name}` | only {shown} | {sentence} |"


if __name__ == "__main__":
    print(markdown(), end="")
