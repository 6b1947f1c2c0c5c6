"""What a run leaves behind: typed records, the run folder, and the append-only metrics file. Never imports torch."""

from __future__ import annotations

import json
import math
import os
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from paceline.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run writes."""

    project: Path = Path("runs")
    """Folder that holds the run folders."""
    name: str = ""
    """Name of the run folder; empty takes the command's with the first free number: train, train2, ..."""
    exist_ok: bool = False
    """Write into a named run folder that exists already."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of a run when it starts."""

    folder: Path
    model: str
    data: str
    class_names: tuple[str, ...]
    epochs: int
    num_train_images: int
    num_val_images: int
    num_parameters: int
    device: str
    precision: str
    optimizer: str
    step: str = ""
    """How a step is carried out, what else was timed, and when; empty in records of versions that did not say it."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished step; `loss` is None where the device has not been asked for it."""

    epoch: int
    step: int
    steps_in_epoch: int
    images: int
    seconds: float
    loss: LossRecord | None


@dataclass(frozen=True, kw_only=True)
class LossRecord:
    """Mean losses with their gains applied."""

    box: float
    cls: float
    dfl: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.box + self.cls + self.dfl


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """COCO's twelve figures (-1 where undefined) and those at the best F1 threshold; all in [0, 1]."""

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    precision: float
    recall: float
    f1: float
    threshold: float
    num_images: int
    num_boxes: int
    per_class: tuple[ClassRecord, ...] = ()

    def __str__(self) -> str:
        """Say the main figures: `AP 0.531, AP50 0.770, P 0.812, R 0.702 on 8 images with 14 boxes`."""
        figures = (("AP", self.ap), ("AP50", self.ap50), ("P", self.precision), ("R", self.recall))
        words = ", ".join(f"{name} {value:.3f}" if value >= 0 else f"{name} -" for name, value in figures)
        return f"{words} on {self.num_images:,} images with {self.num_boxes:,} boxes"


@dataclass(frozen=True, kw_only=True)
class ClassRecord:
    """The figures of one class; precision, recall and F1 at the threshold that is best over all classes."""

    name: str
    num_boxes: int
    num_images: int
    ap: float
    ap50: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One line of `metrics.jsonl`. Spans of the main thread exclude each other and sum to `wall_s`."""

    epoch: int
    """From 1."""
    epochs: int
    step: int
    """Steps since the start of the run."""
    images: int
    wall_s: float
    elapsed_s: float
    """Since the start of training, pauses between resumed parts left out."""
    train_images_per_s: float
    learning_rate: float
    loss: LossRecord
    evaluation: EvaluationRecord | None
    """None where the epoch was not evaluated, or its figures come later, in a `LateEvaluationRecord`."""
    best_ap: float
    """Of what is known so far."""
    spans_s: dict[str, float] = field(default_factory=dict)
    device_ms: dict[str, float] = field(default_factory=dict)
    background_s: dict[str, float] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LateEvaluationRecord:
    """One line of `metrics.jsonl`, of kind `evaluation`: figures that came after the line of their epoch."""

    epoch: int
    """Whose weights were evaluated."""
    evaluation: EvaluationRecord
    best_ap: float
    elapsed_s: float
    """Of training, when the figures were there."""
    seconds: float
    """That the evaluation took, beside the training."""


@dataclass(frozen=True, kw_only=True)
class EndRecord:
    """How a run ended."""

    folder: Path
    reason: str
    """`finished`, `stopped early`, `time budget spent` or `preempted`."""
    epochs: int
    best_epoch: int
    best: EvaluationRecord | None
    wall_s: float


def to_jsonable(value: object) -> Any:
    """Turn records into plain JSON values; numbers that JSON does not know become null."""
    if hasattr(value, "__dataclass_fields__"):
        return to_jsonable(asdict(value))  # type: ignore[call-overload]
    if isinstance(value, dict):
        return {str(key): to_jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [to_jsonable(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    Raises UserError when the disk is full or the folder cannot be written.
    """
    with replaced_atomically(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Give a temporary file for the body to write; after the body it reaches the disk and takes the place of `path`.

    Raises UserError when the disk is full or the folder cannot be written; `path` is then as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as stream:  # only now: the body may have put another file in its place
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; free some space or choose another project folder."
        ) from error


def append_line(path: Path, values: Mapping[str, object]) -> None:
    """Add a line of JSON to a file, on a line of its own also where a kill has cut off the one before.

    Raises UserError when the disk is full or the file cannot be written.
    """
    line = json.dumps(to_jsonable(values), allow_nan=False).encode() + b"\n"
    try:
        with path.open("a+b") as stream:
            if stream.tell() > 0:
                stream.seek(-1, os.SEEK_END)
                line = line if stream.read(1) == b"\n" else b"\n" + line
            stream.write(line)
    except OSError as error:
        raise UserError(
            f"Cannot write {path}: {error.strerror or error}; free some space and resume the run."
        ) from error


def read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Read what `append_line` wrote; nothing where there is no file. A line that was cut off is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """The files of one run.

    ```
    runs/train3/
      config.yaml       every option as it was resolved; `paceline train --config` takes it
      metrics.jsonl     one line of JSON per record, only ever appended to
      weights/          best.safetensors, last.safetensors (+ .json beside each), resume.safetensors
      pictures/         batches, predictions, curves
      DONE, PREEMPTED   one of these empty files when the run has ended, or was asked to stop
    ```
    """

    path: Path

    @staticmethod
    def require_free(project: Path, name: str, *, exist_ok: bool) -> None:
        """Raise UserError where a run's name is taken; nothing is written, so it can be asked before any work."""
        path = project / name
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; choose another name for the run.")
        if path.is_dir() and any(path.iterdir()) and not exist_ok:
            raise UserError(f"The run folder {path} exists already; choose another name, or pass exist_ok=True.")

    @classmethod
    def create(cls, project: Path, name: str, *, exist_ok: bool, default_name: str = "train") -> RunFolder:
        """Make a new folder; without a name, the first free one of train, train2, train3, ...

        With `exist_ok` records, marks and weights of an earlier training in the named folder are cleared for a new one,
        so that nobody goes on from them. Raises UserError when the user's own name is taken and `exist_ok` is False, or
        when it is that of a training and the folder is for something else.
        """
        try:
            project.mkdir(parents=True, exist_ok=True)
            if name:
                cls.require_free(project, name, exist_ok=exist_ok)
                path = project / name
                folder = cls(path=path)
                if default_name != "train" and folder.weights.is_dir():
                    raise UserError(
                        f"{path} is the folder of a training, which must not be written over; choose another name."
                    )
                path.mkdir(parents=True, exist_ok=True)
                folder.metrics.unlink(missing_ok=True)
                folder.mark("")
                folder.sweep()
                for pattern in ("*.safetensors", "*.json"):
                    for file in folder.weights.glob(pattern):
                        file.unlink(missing_ok=True)
                return folder
            number = 1
            while True:
                path = project / (default_name if number == 1 else f"{default_name}{number}")
                try:
                    path.mkdir()
                    return cls(path=path)
                except FileExistsError:
                    number += 1
        except OSError as error:
            raise UserError(
                f"Cannot make a run folder in {project}: {error.strerror or error}; choose another project folder."
            ) from error

    @property
    def config(self) -> Path:
        """The resolved options."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """The append-only records."""
        return self.path / "metrics.jsonl"

    @property
    def weights(self) -> Path:
        """Folder of weights."""
        return self.path / "weights"

    @property
    def pictures(self) -> Path:
        """Folder of pictures."""
        return self.path / "pictures"

    def mark(self, word: Literal["", "DONE", "PREEMPTED"]) -> None:
        """Leave an empty file of this name as the only mark, for scripts that start runs; none while a run goes on."""
        for name in ("DONE", "PREEMPTED"):
            if name != word:
                (self.path / name).unlink(missing_ok=True)
        if word:
            write_atomically(self.path / word, b"")

    def sweep(self) -> None:
        """Remove weights that a kill has left half written, beside the whole ones that they were to replace."""
        for file in self.weights.glob(".*.safetensors.*"):
            file.unlink(missing_ok=True)

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end."""
        return (self.path / "DONE").exists()

    def append(self, kind: str, record: object) -> None:
        """Add one line to `metrics.jsonl`: `{"kind": kind, "version": 1, ...fields}`."""
        append_line(self.metrics, {"kind": kind, "version": FORMAT_VERSION} | to_jsonable(record))

    def records(self, *kinds: str) -> Iterator[Mapping[str, Any]]:
        """Read the lines of some kinds."""
        return (line for line in read_lines(self.metrics) if line.get("kind") in kinds)

    def epochs(self) -> list[dict[str, Any]]:
        """Read the epochs with their figures, wherever these stand; see `joined_epochs`."""
        return joined_epochs(self.records("epoch", "evaluation"))


def joined_epochs(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Join lines of kind `epoch` and `evaluation`: one entry per epoch, in order, with the fields of its line.

    `evaluation` holds the epoch's figures even where they came in a line of their own, and `evaluated_s` the seconds
    of training when they were there. Of lines of the same epoch (a resumed run) the last counts.
    """
    epochs: dict[int, dict[str, Any]] = {}
    late: dict[int, Mapping[str, Any]] = {}
    for line in lines:
        number = int(line["epoch"])
        if line["kind"] == "evaluation":
            late[number] = line
            continue
        epochs[number] = {**line}
        if line.get("evaluation"):
            epochs[number]["evaluated_s"] = line["elapsed_s"]
            late.pop(number, None)
    for number, line in late.items():
        if number in epochs:
            epochs[number] |= {"evaluation": line["evaluation"], "evaluated_s": line["elapsed_s"]}
    return [epochs[number] for number in sorted(epochs)]
