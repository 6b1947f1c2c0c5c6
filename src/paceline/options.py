"""The options of each command: the rooms' configs put together, and their flat names. Never imports torch.

A user never sees the rooms: every option has one name of its own (`imgsz`, `lr0`, ...), the same on the command line,
in Python and in YAML files.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_type_hints

from paceline.addresses import recall, remember, shown
from paceline.arguments import MEANT, is_neutral, of_this_command
from paceline.commands.config import BenchConfig, PredictConfig, ValConfig
from paceline.data.cache_folder import cache_folder
from paceline.data.config import AugmentConfig, DataConfig
from paceline.errors import UserError
from paceline.evaluation.config import PostprocessConfig
from paceline.losses.config import LossConfig
from paceline.option_values import AUTO_BATCH, memory_of_batch, typed
from paceline.parallel.config import LimitsConfig, ParallelConfig, RanksConfig
from paceline.records import RunConfig, to_jsonable, write_atomically
from paceline.training.config import LoopConfig, OptimConfig
from paceline.tuning.config import TuneConfig

if TYPE_CHECKING:
    from collections.abc import Mapping


LAYOUT_OPTIONS = frozenset({"parallel", "stages", "microbatches", "schedule", "gradients"})
"""How a run is laid out over devices, which its checkpoints do not depend on."""
RESUMED_ANEW = LAYOUT_OPTIONS | {
    "device",
    *(entry.name for config in (RanksConfig, LimitsConfig) for entry in fields(config)),
}
"""What may be said anew when a run goes on; the rest it keeps."""


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """Where the option of one flat name lives."""

    name: str
    room: str
    """Field of the options class that holds it; empty for one that stands by itself, such as `model`."""
    annotation: object
    default: object


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the options of every command can do; see the classes below for what they hold."""

    COMMAND: ClassVar[str] = ""
    POSITIONAL: ClassVar[tuple[str, ...]] = ()
    """Options that the command line takes without their names, in this order."""

    @classmethod
    def from_flat(cls, mapping: Mapping[str, object], *, base: Self | None = None) -> Self:
        """Build the options from flat names; what is not named comes from `base`, or else from the defaults.

        Values may be spelled as on a command line (`"640"`, `"true"`, `"[0, 2]"`). Raises UserError for an unknown
        name, with the closest known one or the sentence for an argument of the reference, and for a bad value; for
        several of them with a sentence each.
        """
        known = option_fields(cls)
        values: dict[str, dict[str, object]] = {}
        mistakes: list[UserError] = []
        for name, value in _settle_batch(cls, mapping).items():
            key = name.replace("-", "_")
            try:
                if key in known:
                    entry = known[key]
                    values.setdefault(entry.room, {})[key] = typed(key, value, entry.annotation, entry.default)
                elif not is_neutral(cls.COMMAND, key, value):
                    raise unknown_option(cls, name)
            except UserError as error:
                mistakes.append(error)
        if mistakes:
            raise mistakes[0] if len(mistakes) == 1 else UserError(" ".join(str(error) for error in mistakes))
        start = cls() if base is None else base
        return start._with(values)

    def _with(self, values: Mapping[str, Mapping[str, object]]) -> Self:
        rooms = {room: replace(getattr(self, room), **changes) for room, changes in values.items() if room}
        return replace(self, **rooms, **values.get("", {}))

    def to_flat(self) -> dict[str, object]:
        """Every option by its flat name, in the order of the rooms; `from_flat` of it gives equal options."""
        return {
            entry.name: getattr(getattr(self, entry.room) if entry.room else self, entry.name)
            for entry in option_fields(type(self)).values()
        }

    def to_yaml(self, *, whole: bool = False) -> str:
        """Every option as YAML, one paragraph per room.

        whole: with the passwords and signatures of addresses; else they are hidden, and remembered on this machine.
        """
        import yaml

        lines = [f"# Every option of this run; `paceline {self.COMMAND} --config FILE` repeats it."]
        flat, room = self.to_flat(), ""
        for entry in option_fields(type(self)).values():
            if entry.room != room:
                room = entry.room
                lines += ["", f"# {room}"]
            value = to_jsonable(flat[entry.name])
            if isinstance(value, str) and not whole:
                remember(value, cache_folder())
                value = shown(value)
            text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
            end_mark = "\n...\n"  # which YAML puts after a scalar
            lines.append(f"{entry.name}: {text.removesuffix(end_mark).rstrip()}")
        return "\n".join(lines) + "\n"

    def write(self, path: Path) -> None:
        """Write the options as YAML, for others to read too; raises UserError when that is not possible."""
        write_atomically(path, self.to_yaml().encode())

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, object] | None = None) -> Self:
        """Read options from YAML, also an `args.yaml` of the reference; `overrides` (flat names) go before the file's.

        Raises UserError for a file that is missing, is not a mapping of flat names, or holds a bad value.
        """
        mapping = of_this_command(cls.COMMAND, read_mapping(path), option_fields(cls))
        try:
            base = cls.from_flat(mapping)
        except UserError as error:
            raise UserError(f"In {path}: {error}") from error
        return cls.from_flat(overrides or {}, base=base)


@dataclass(frozen=True, kw_only=True)
class TrainOptions(Options):
    """Options of `paceline train`."""

    COMMAND: ClassVar[str] = "train"

    model: str = "yolo11n"
    """Name of a network (`paceline models` lists them), or weights to start from."""
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)
    ranks: RanksConfig = field(default_factory=RanksConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)


@dataclass(frozen=True, kw_only=True)
class TuneOptions(TrainOptions):
    """Options of `paceline tune`: those of its trials, and of the search.

    `time`, `resume`, `device`, `project` and `name` are the search's: its budget, the search to go on with, the
    devices that trials run on side by side, and its folder.
    """

    COMMAND: ClassVar[str] = "tune"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("data",)

    tune: TuneConfig = field(default_factory=TuneConfig)

    def training(self) -> TrainOptions:
        """Options of a trial before the search changes any."""
        return TrainOptions(**{entry.name: getattr(self, entry.name) for entry in fields(TrainOptions)})


@dataclass(frozen=True, kw_only=True)
class ValOptions(Options):
    """Options of `paceline val`."""

    COMMAND: ClassVar[str] = "val"

    model: str = ""
    """Weights to evaluate: a file such as `runs/train/weights/best.safetensors`, or the run folder."""
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValConfig = field(default_factory=ValConfig)
    postprocess: PostprocessConfig = field(default_factory=PostprocessConfig)

    @property
    def data(self) -> DataConfig:
        """The data room's view of what is evaluated."""
        return DataConfig(
            data=self.validation.data,
            imgsz=self.validation.imgsz,
            batch=self.validation.batch,
            workers=self.validation.workers,
            rect=self.validation.rect,
            single_cls=self.validation.single_cls,
            classes=self.validation.classes,
        )


@dataclass(frozen=True, kw_only=True)
class PredictOptions(Options):
    """Options of `paceline predict`."""

    COMMAND: ClassVar[str] = "predict"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("source",)

    model: str = ""
    """Weights to predict with: a file such as `runs/train/weights/best.safetensors`, or the run folder."""
    run: RunConfig = field(default_factory=RunConfig)
    prediction: PredictConfig = field(default_factory=PredictConfig)
    postprocess: PostprocessConfig = field(default_factory=lambda: PostprocessConfig(conf=0.25))


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """Options of `paceline bench`."""

    COMMAND: ClassVar[str] = "bench"

    model: str = "yolo11n"
    """Name of a network (`paceline models` lists them), or weights of a run."""
    bench: BenchConfig = field(default_factory=BenchConfig)


@dataclass(frozen=True, kw_only=True)
class DataCheckOptions(Options):
    """Options of `paceline data check`."""

    COMMAND: ClassVar[str] = "data check"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("data",)

    data: str = ""
    """Data set: `shapes`, a YOLO `data.yaml`, a COCO folder or JSON, a Pascal VOC folder, or a pack."""
    plot: str = ""
    """Also draw classes, box sizes and places into this file (.png, .jpg or .svg)."""


@dataclass(frozen=True, kw_only=True)
class DataPackOptions(Options):
    """Options of `paceline data pack`."""

    COMMAND: ClassVar[str] = "data pack"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("data", "out")

    data: str = ""
    """Data set: `shapes`, a YOLO `data.yaml`, a COCO folder or JSON, a Pascal VOC folder, or a pack."""
    out: str = ""
    """File to write, such as `set.pack`; one that is there is replaced when the new one is whole."""
    decoded: bool = False
    """Pack pixels instead of encoded images: larger, but nothing is left to decode."""
    imgsz: int = 0
    """With `decoded`: shrink images (by 2, 4 or 8) as far as training at this size would; 0 shrinks none."""
    splits: tuple[str, ...] = ()
    """Those of train, val and test to pack; empty means all."""


@dataclass(frozen=True, kw_only=True)
class DataConvertOptions(Options):
    """Options of `paceline data convert`."""

    COMMAND: ClassVar[str] = "data convert"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("data", "out")

    data: str = ""
    """Data set: `shapes`, a YOLO `data.yaml`, a COCO folder or JSON, a Pascal VOC folder, or a pack."""
    out: str = ""
    """Folder to write, which must be new; for `pack`, the file."""
    format: Literal["auto", "yolo", "coco", "voc", "pack"] = "auto"
    """What to write; `auto` takes `pack` where the name ends in .pack."""
    strict: bool = False
    """Refuse to drop what the format cannot hold."""
    link: bool = False
    """Link images instead of copying them, where the file system can."""


@dataclass(frozen=True, kw_only=True)
class DataPlotOptions(Options):
    """Options of `paceline data plot`."""

    COMMAND: ClassVar[str] = "data plot"
    POSITIONAL: ClassVar[tuple[str, ...]] = ("data", "file")

    data: str = ""
    """Data set: `shapes`, a YOLO `data.yaml`, a COCO folder or JSON, a Pascal VOC folder, or a pack."""
    file: str = "dataset.png"
    """Picture to write (.png, .jpg or .svg)."""


def option_fields(options: type[Options]) -> Mapping[str, OptionField]:
    """Every option of a class by its flat name, in the order of its rooms."""
    table: dict[str, OptionField] = {}
    default = options()
    hints = get_type_hints(options)
    for entry in fields(options):
        part = getattr(default, entry.name)
        if is_dataclass(part) and not isinstance(part, type):
            room_hints = get_type_hints(type(part))
            found = [
                OptionField(name=f.name, room=entry.name, annotation=room_hints[f.name], default=getattr(part, f.name))
                for f in fields(part)
            ]
        else:
            found = [OptionField(name=entry.name, room="", annotation=hints[entry.name], default=part)]
        for option in found:
            assert option.name not in table, f"two rooms have an option {option.name}"
            table[option.name] = option
    return table


def _settle_batch(options: type[Options], mapping: Mapping[str, object]) -> dict[str, object]:
    """Write out what a batch that is not a number means: `0.7` is `auto` with this share of the memory.

    Raises UserError for a share that is named twice, and where the batch is not chosen.
    """
    settled = dict(mapping)
    share = memory_of_batch(mapping.get("batch"))
    if share is None and str(mapping.get("batch", "")).strip().lower() not in {"auto", str(AUTO_BATCH)}:
        return settled
    if "memory" not in option_fields(options):
        raise UserError(
            f"batch={mapping['batch']} chooses a batch by measuring training; give {options.COMMAND} a number."
        )
    if share is not None:
        if mapping.get("memory") is not None:
            raise UserError(f"batch={mapping['batch']} is a share of memory, and memory= names one too; drop one.")
        settled |= {"batch": AUTO_BATCH, "memory": share}
    return settled


def unknown_option(options: type[Options], name: str) -> UserError:
    """Name what to do about an option that is not there: the closest one, or the help."""
    known = option_fields(options)
    meant = [MEANT[name.lower()]] if MEANT.get(name.lower()) in known else []
    close = meant or difflib.get_close_matches(name.replace("-", "_").lower(), known, n=1, cutoff=0.6)
    if close:
        return UserError(f"{options.COMMAND} has no option {name}; did you mean {close[0]}?")
    return UserError(f"{options.COMMAND} has no option {name}; `paceline {options.COMMAND} --help` lists them all.")


def read_mapping(path: Path) -> dict[str, object]:
    """Read a YAML file of flat names, what is hidden of addresses in it filled in from what this machine remembers.

    Raises UserError for a file that is missing or is not such a mapping.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}; check the path.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML; write one `name: value` per line.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a mapping; write one `name: value` per line.")
    folder = cache_folder()
    return {str(name): recall(value, folder) if isinstance(value, str) else value for name, value in content.items()}


def settle_resume(mapping: Mapping[str, object]) -> dict[str, object]:
    """Name the run that `resume=true` means when a run is named beside it, and refuse what resuming would ignore.

    A resumed run keeps the options that it was started with, but may go on on other devices, laid out over them in
    another way, with other limits, and from another address of its pack. Raises UserError for any other option beside
    `resume`; beside `resume=auto` they are those of a run that may have to start.
    """
    settled = {name.replace("-", "_"): value for name, value in mapping.items()}
    resume = TrainOptions.from_flat({"resume": settled.get("resume")}).loop.resume
    if not resume or resume == "auto":
        return settled
    model = str(settled.get("model") or "")
    path = Path(model)
    is_run = path.suffix in {".safetensors", ".pt"} or len(path.parts) > 1 or path.is_dir()
    if resume == "true" and model and is_run and path.suffix not in {".yaml", ".yml"}:
        settled["resume"] = model
    settled.pop("model", None)
    others = sorted(set(settled) - {"resume", "project"} - RESUMED_ANEW)
    if "data" in others and "://" in str(settled["data"]):
        others.remove("data")
    if others:
        raise UserError(f"A resumed run keeps its own options; leave out {', '.join(others)}, or start a new run.")
    return settled
