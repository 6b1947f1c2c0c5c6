"""How the value of an option may be spelled, of which type it is, and within which bounds. Never imports torch.

The command line, YAML files and Python calls all come through `typed`, so what one of them takes, all take.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal, get_args, get_origin

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable


STRIDE = 32
AUTO_BATCH = -1
"""`batch=auto`, as a number."""
_WORDS: dict[str, bool | None] = {
    "true": True,
    "yes": True,
    "on": True,
    "false": False,
    "no": False,
    "off": False,
    "none": None,
    "null": None,
}


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Which numbers an option takes; `above` and `below` are left out, `least` and `most` belong to it."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def hold(self, value: float) -> bool:
        """Whether the number lies within; NaN never does."""
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        parts = [
            f"at least {self.least:g}" if self.least > -math.inf else "",
            f"above {self.above:g}" if self.above > -math.inf else "",
            f"at most {self.most:.10g}" if self.most < math.inf else "",
            f"below {self.below:g}" if self.below < math.inf else "",
        ]
        return " and ".join(part for part in parts if part)


_SHARE = Bounds(least=0, most=1)
_NOT_NEGATIVE = Bounds(least=0)
_POSITIVE = Bounds(least=1)

BOUNDS = MappingProxyType(
    {
        "batch": _POSITIVE,
        "memory": Bounds(above=0, most=1),
        "workers": Bounds(least=-1),
        "fraction": Bounds(above=0, most=1),
        "classes": Bounds(least=0),
        "hsv_h": _SHARE,
        "hsv_s": _SHARE,
        "hsv_v": _SHARE,
        "degrees": Bounds(least=0, most=180),
        "translate": _SHARE,
        "scale": Bounds(least=0, below=1),
        "shear": Bounds(least=0, below=90),
        "flipud": _SHARE,
        "fliplr": _SHARE,
        "mosaic": _SHARE,
        "perspective": Bounds(least=0, most=0.001),
        "mixup": _SHARE,
        "cutmix": _SHARE,
        "copy_paste": _SHARE,
        "greyscale": _SHARE,
        "bgr": _SHARE,
        "multi_scale": Bounds(least=0, below=1),
        "close_mosaic": _NOT_NEGATIVE,
        "box": _NOT_NEGATIVE,
        "cls": _NOT_NEGATIVE,
        "dfl": _NOT_NEGATIVE,
        "lr0": Bounds(above=0),
        "lrf": Bounds(above=0),
        "momentum": Bounds(least=0, below=1),
        "weight_decay": _NOT_NEGATIVE,
        "warmup_epochs": _NOT_NEGATIVE,
        "warmup_momentum": Bounds(least=0, below=1),
        "warmup_bias_lr": _NOT_NEGATIVE,
        "nbs": _POSITIVE,
        "clip": _NOT_NEGATIVE,
        "epochs": _POSITIVE,
        "patience": _NOT_NEGATIVE,
        "seed": Bounds(least=0, most=2**32 - 1),
        "freeze": _NOT_NEGATIVE,
        "val_interval": _POSITIVE,
        "save_period": Bounds(least=-1),
        "stages": _NOT_NEGATIVE,
        "microbatches": _NOT_NEGATIVE,
        "conf": _SHARE,
        "iou": _SHARE,
        "max_det": _POSITIVE,
        "devices": _NOT_NEGATIVE,
        "limit_start": _NOT_NEGATIVE,
        "limit_index": _NOT_NEGATIVE,
        "limit_compile": _NOT_NEGATIVE,
        "limit_step": _NOT_NEGATIVE,
        "limit_evaluation": _NOT_NEGATIVE,
        "limit_checkpoint": _NOT_NEGATIVE,
        "limit_silence": Bounds(least=5),
        "num_classes": _NOT_NEGATIVE,
        "seconds": Bounds(above=0),
        "trials": _NOT_NEGATIVE,
        "confirm": _NOT_NEGATIVE,
        "finalists": _POSITIVE,
        "cores_per_trial": _NOT_NEGATIVE,
    }
)
"""Bounds of every number by the option's name; `imgsz` has a rule of its own."""


def plain(value: object) -> object:
    """Read a word from the command line as YAML would: a truth value, nothing, a number, a list, or else text."""
    if not isinstance(value, str):
        return value
    word = value.strip()
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    for reader in (int, float):
        try:
            return reader(word)
        except ValueError:
            continue
    if word[:1] in "[{":
        try:
            return json.loads(word.replace("'", '"'))
        except json.JSONDecodeError:
            return value
    return value


def typed(name: str, value: object, annotation: object, default: object) -> object:
    """Bring the value of option `name` to its type, whatever way it is spelled; None stands for the default.

    Raises UserError for a value of another type or out of bounds, with one that would do.
    """
    is_choice = "none" in get_args(annotation)  # as of `cache` and `pruner`
    if value is None or (isinstance(value, str) and value.strip().lower() in {"none", "null"} and not is_choice):
        return default
    if name in _SPELLINGS:
        value = _SPELLINGS[name](value)
    result = _coerce(name, value, annotation)
    if result != default:
        _check_bounds(name, result)
    return result


def _coerce(name: str, value: object, annotation: object) -> object:
    if annotation is bool:
        return _truth(name, value)
    if annotation is int:
        return _whole(name, value)
    if annotation is float:
        return _number(name, value)
    if annotation is Path:
        return Path(str(value))
    if annotation is str:
        return str(value)
    if get_origin(annotation) is Literal:
        return _choice(name, value, get_args(annotation))
    if get_origin(annotation) is tuple:
        kind = get_args(annotation)[0]
        return tuple(_coerce(name, entry, kind) for entry in _entries(value, kind))
    raise AssertionError(f"no rule for the type of {name}: {annotation}")


def _truth(name: str, value: object) -> bool:
    simple = plain(value)
    if isinstance(simple, bool | int | float) and simple in (0, 1):
        return bool(simple)
    raise UserError(f"{name}={value} is neither true nor false; write {name}=true or {name}=false.")


def _whole(name: str, value: object) -> int:
    simple = plain(value)
    if isinstance(simple, float) and simple.is_integer():
        simple = int(simple)
    if isinstance(simple, int) and not isinstance(simple, bool):
        return simple
    raise UserError(f"{name}={value} is not a whole number; write for example {name}={_example(name)}.")


def _number(name: str, value: object) -> float:
    simple = plain(value)
    if isinstance(simple, int | float) and not isinstance(simple, bool):
        return float(simple)
    raise UserError(f"{name}={value} is not a number; write for example {name}={_example(name)}.")


def _example(name: str) -> str:
    bounds = BOUNDS.get(name)
    if name == "imgsz":
        return "640"
    if bounds is None or bounds.most > 1:
        return "1"
    return "0.5"


def _choice(name: str, value: object, choices: tuple[object, ...]) -> object:
    for choice in choices:
        if str(value).lower() == str(choice).lower():
            return choice
    *first, last = (str(choice) for choice in choices)
    raise UserError(f"{name}={value} is not known; choose {', '.join(first)} or {last}.")


def _entries(value: object, kind: object) -> list[object]:
    """Split a list into its entries, whether it is one, or `[0, 2]`, `0,2` or a single entry."""
    if isinstance(value, list | tuple):
        return list(value)
    if kind is int and isinstance(value, str):
        return [entry for entry in re.split(r"[\s,\[\]()]+", value) if entry]
    return [value]


def _check_bounds(name: str, value: object) -> None:
    if name == "imgsz":
        _check_imgsz(value)
    bounds = BOUNDS.get(name)
    if bounds is None:
        return
    if name == "batch" and value == AUTO_BATCH:
        return
    for entry in value if isinstance(value, tuple) else (value,):
        if not bounds.hold(float(entry)):
            raise UserError(f"{name}={entry} is out of range; it must be {bounds}.")


def _check_imgsz(value: object) -> None:
    assert isinstance(value, int)
    if value > 0 and value % STRIDE == 0:
        return
    lower, upper = value // STRIDE * STRIDE, value // STRIDE * STRIDE + STRIDE
    if lower < STRIDE:
        raise UserError(f"imgsz={value} is no multiple of {STRIDE}; the nearest is {STRIDE}.")
    raise UserError(f"imgsz={value} is no multiple of {STRIDE}; the nearest are {lower} and {upper}.")


def _spell_imgsz(value: object) -> object:
    sides = plain(value)
    if isinstance(sides, str) and "," in sides:
        sides = [plain(side) for side in sides.split(",")]
    if not isinstance(sides, list | tuple):
        return sides
    if len({str(side) for side in sides}) == 1:
        return sides[0]
    raise UserError(f"imgsz={value} has two sides, but the network's input is square; give the longer one alone.")


def _spell_batch(value: object) -> object:
    simple = plain(value)
    if not isinstance(simple, str):
        return simple
    if simple.strip().lower() != "auto":
        raise UserError(f"batch={value} is not known; write a number of images, such as batch=16, or batch=auto.")
    return AUTO_BATCH


def memory_of_batch(value: object) -> float | None:
    """Read the share of memory that a batch such as 0.7 names; None for any other batch."""
    simple = plain(value)
    return simple if isinstance(simple, float) and 0 < simple < 1 else None


_OTHER_DEVICES = {
    "mps": "Apple's GPUs",
    "xpu": "Intel's GPUs",
    "npu": "Huawei's Ascend processors",
}


def _spell_device(value: object) -> str:
    if isinstance(value, list | tuple):
        value = ",".join(str(entry) for entry in value)
    word = str(value).strip().strip("[]()").replace(" ", "").lower()
    word = "cuda" if word in {"gpu", "nvidia"} else "cpu" if word == "cpu:0" else word
    words = [part.removeprefix("cuda:") for part in word.split(",") if part]
    if len(words) > 1 and all(part.isdigit() for part in words):
        return ",".join(words)
    word = words[0] if len(words) == 1 else word
    if word in {"", "auto", "cpu", "cuda"} or word.isdigit():
        return word or "auto"
    kind = word.partition(":")[0]
    if kind in _OTHER_DEVICES:
        raise UserError(f"device={value} means {_OTHER_DEVICES[kind]}, which are not supported yet; write device=cpu.")
    raise UserError(
        f"device={value} is not known; choose auto, cpu, cuda, the number of a GPU such as 0, or several such as 0,1."
    )


def _spell_multi_scale(value: object) -> object:
    simple = plain(value)
    return (0.5 if simple else 0.0) if isinstance(simple, bool) else simple


def _is_truth(value: object) -> bool:
    """Whether a value is true or false, also as 1 or 0."""
    simple = plain(value)
    return isinstance(simple, bool | int) and simple in (0, 1)


def _spell_amp(value: object) -> object:
    return ("auto" if plain(value) else "off") if _is_truth(value) else value


def _spell_cache(value: object) -> object:
    return ("ram" if plain(value) else "none") if _is_truth(value) else value


def _spell_optimizer(value: object) -> object:
    if str(value).lower() in {"auto", "sgd", "adamw"}:
        return value
    raise UserError(f"optimizer={value} is not offered; choose auto, SGD or AdamW.")


def _spell_resume(value: object) -> str:
    return ("true" if plain(value) else "") if _is_truth(value) else str(value)


def _spell_pretrained(value: object) -> object:
    if _is_truth(value):
        return value
    if str(value).endswith(".pt"):
        raise UserError(
            f"pretrained={value} names a PyTorch pickle, which Paceline cannot read yet; leave it out to train from "
            "scratch."
        )
    raise UserError(f"pretrained={value} names weights; name them by model={value} instead.")


def _spell_freeze(value: object) -> object:
    simple = plain(value)
    if isinstance(simple, list | tuple) or "," in str(value):
        raise UserError(f"freeze={value} is a list; give one number, and that many first nodes are not trained.")
    return simple


def _spell_time(value: object) -> str:
    word = str(value).strip().lower()
    if word == "":
        return ""
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)", word)
    if match is None or float(match[1]) == 0:
        raise UserError(f"time={value} is not a duration; write 30m, 2h, 90s, or a number of hours such as 1.5.")
    return word.replace(" ", "")


_SPELLINGS: MappingProxyType[str, Callable[[object], object]] = MappingProxyType(
    {
        "imgsz": _spell_imgsz,
        "batch": _spell_batch,
        "device": _spell_device,
        "amp": _spell_amp,
        "multi_scale": _spell_multi_scale,
        "cache": _spell_cache,
        "optimizer": _spell_optimizer,
        "resume": _spell_resume,
        "pretrained": _spell_pretrained,
        "freeze": _spell_freeze,
        "time": _spell_time,
    }
)
