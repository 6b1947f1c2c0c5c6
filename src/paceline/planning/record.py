"""The record of a bench: everything that `paceline bench` measured, and what it measured it on. Never imports torch."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from paceline.errors import UserError
from paceline.planning.spread import Spread  # noqa: TC001 - what reads a record looks up its types
from paceline.records import to_jsonable, write_atomically

if TYPE_CHECKING:
    from pathlib import Path

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MachineRecord:
    """What was measured on."""

    device: str
    """Name of the GPU, or of the processor."""
    processor: str
    cores: int
    """That this process may use."""
    memory_gb: float
    """Of the device: the GPU's, or the host's."""
    threads: int
    """Within an operation on the CPU."""
    load_average: float
    """Processes that wanted a core in the minute before."""
    python: str
    versions: dict[str, str]
    """Of the packages that matter, CUDA and cuDNN among them where there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class LimitsRecord:
    """What the device does at most, measured in the same run."""

    operations_per_s: dict[str, float]
    """By type (fp32, bf16, ...): the best of matrix products of several sizes and a large convolution."""
    best: dict[str, str]
    """By type: what that was."""
    bytes_per_s: float
    """Of a large copy, bytes read and bytes written together."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """One part of the step, measured and predicted; milliseconds."""

    measured_ms: Spread | None
    """None where the parts cannot be told apart, as in a graph of the whole step."""
    limit_ms: float
    """At the limits."""
    attainable_ms: float
    """At what good kernels reach of them."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """The step alone: forward, loss with assignment, backward, optimiser, moving average."""

    images: int
    """Per step, over all devices."""
    images_per_s: Spread
    whole_ms: Spread
    """Timed from outside, without anything timed within."""
    parts: dict[str, PartRecord]
    limit_ms: float
    attainable_ms: float
    operations: float
    """Of one device's share of the step, as predicted."""
    bytes: float
    """That it moves, as predicted."""
    memory_share: float
    """Share of `limit_ms` in passes that wait for memory."""


@dataclass(frozen=True, kw_only=True)
class NodeRecord:
    """One node of the network, forward and backward, run by itself in eager mode."""

    node: int
    kind: str
    measured_ms: float
    limit_ms: float
    attainable_ms: float


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """Most memory that the step needed."""

    kind: Literal["allocator", "resident"]
    """torch's allocator on a GPU, or the growth of the process's resident memory on a CPU."""
    peak_bytes: int
    reserved_bytes: int
    """What the allocator took from the GPU for it; the whole resident process on a CPU."""


@dataclass(frozen=True, kw_only=True)
class EnergyRecord:
    """Energy of the steps."""

    joules_per_image: float | None
    source: str
    """What counted it and what it covers, or why nothing did."""


@dataclass(frozen=True, kw_only=True)
class EvaluationBenchRecord:
    """Evaluation of the fused network."""

    network_images_per_s: Spread
    images_per_s: Spread
    """With decoding and non-maximum suppression."""
    limit_images_per_s: float
    """Of the network alone."""
    candidates: float
    """Candidates per image that suppression had to look at."""


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """The loader and the whole, on a data set."""

    data: str
    images: int
    drawn_by: str
    """Who draws the training pictures: the host or the device."""
    loader_images_per_s: Spread
    """Batches as they come to the device, with nothing else to do."""
    images_per_s: Spread
    """End to end."""
    waiting_share: Spread
    """Share of the time end to end in which the step waits for its batch."""


@dataclass(frozen=True, kw_only=True)
class RanksRecord:
    """Several devices."""

    devices: int
    alone_ms: Spread
    """The same share of the batch on each device, side by side, with nothing exchanged."""
    waiting_share: Spread
    """What exchanging and waiting for the others takes of a step."""


@dataclass(frozen=True, kw_only=True)
class BenchRecord:
    """All of it."""

    options: dict[str, Any]
    machine: MachineRecord
    model: str
    parameters: int
    gflops: float
    """Per image, forward; convolutions alone, as they are published."""
    plan: str
    """How the step was carried out."""
    precision: str
    limits: LimitsRecord
    step: StepRecord
    nodes: tuple[NodeRecord, ...]
    """All nodes, in order; empty where they were not measured."""
    memory: MemoryRecord
    evaluation: EvaluationBenchRecord | None
    energy: EnergyRecord
    data: DataRecord | None = None
    ranks: RanksRecord | None = None
    wall_s: float = 0.0
    """Of the whole bench."""
    notes: tuple[str, ...] = field(default_factory=tuple)
    """What has to be known to read the figures."""

    def write(self, path: Path) -> None:
        """Write as JSON; raises UserError where that is not possible."""
        content = {"kind": "bench", "version": FORMAT_VERSION} | to_jsonable(self)
        write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> BenchRecord:
        """Read what `write` wrote; raises UserError for anything else."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"Cannot read {path}: {error.strerror or error}; check the path.") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not JSON; name a file that `paceline bench json=FILE` wrote.") from error
        return cls.from_json(content, where=str(path))

    @classmethod
    def from_json(cls, content: object, *, where: str) -> BenchRecord:
        """Build from parsed JSON; raises UserError that names `where` for what is no record of this version."""
        if not isinstance(content, Mapping) or content.get("kind") != "bench":
            raise UserError(f"{where} is no record of a bench; name a file that `paceline bench json=FILE` wrote.")
        if content.get("version") != FORMAT_VERSION:
            raise UserError(
                f"{where} is a bench of format {content.get('version')}, and this version reads {FORMAT_VERSION}; "
                "run the bench again."
            )
        try:
            record: BenchRecord = _read(cls, {key: content[key] for key in content if key not in ("kind", "version")})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is a damaged record of a bench ({error}); run the bench again.") from error
        return record


def _read(annotation: Any, value: Any) -> Any:
    """Turn a plain JSON value into what the annotation says."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        hints = get_type_hints(annotation)
        unknown = set(value) - set(hints)
        if unknown:
            raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
        return annotation(**{name: _read(hints[name], entry) for name, entry in value.items()})
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _read(next(kind for kind in arguments if kind is not type(None)), value)
    if origin is tuple:
        return tuple(_read(arguments[0], entry) for entry in value)
    if origin is dict:
        return {key: _read(arguments[1], entry) for key, entry in value.items()}
    if annotation is float:
        return float(value)
    if annotation in (int, str) and not isinstance(value, annotation):
        raise ValueError(f"{value!r} where a {annotation.__name__} was expected")
    return value
