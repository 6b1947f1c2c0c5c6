"""Checkpoints: tensors in safetensors files with plain JSON beside them; nothing in them can run code.

```
weights/
  last.safetensors  last.json      averaged weights after the last epoch, for evaluation, prediction, new runs
  best.safetensors  best.json      the same of the best epoch
  epoch20.safetensors ...          the same every `save_period` epochs
  resume.safetensors               network, average, optimiser and pending gradients; its JSON travels in its header
```
"""

from __future__ import annotations

import errno
import json
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from paceline.errors import UserError
from paceline.parallel.shards import laid_out_like, local, sharded_like
from paceline.records import replaced_atomically, to_jsonable, write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from paceline.training.optimizer import Optimizer

WEIGHTS_FORMAT = "paceline-weights"
RESUME_FORMAT = "paceline-resume"
VERSION = 1
RESUME_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class WeightsHeader:
    """What has to be known to use weights without the run that made them."""

    model: str
    names: tuple[str, ...]
    imgsz: int
    epoch: int
    metrics: Mapping[str, Any]


def save_weights(path: Path, tensors: Mapping[str, Tensor], header: WeightsHeader) -> None:
    """Write `path` (.safetensors) and the header as JSON beside it, each whole or not at all."""
    _write(path, tensors, {"format": "pt"})
    values = {"format": WEIGHTS_FORMAT, "version": VERSION} | to_jsonable(header)
    write_atomically(path.with_suffix(".json"), (json.dumps(values, indent=1) + "\n").encode())


def load_weights(path: Path) -> tuple[dict[str, Tensor], WeightsHeader]:
    """Read what `save_weights` wrote. Raises UserError for files that are torn or of another kind."""
    header = load_header(path)
    return _read(path)[0], header


def load_header(path: Path) -> WeightsHeader:
    """Read what lies beside weights, without them."""
    header_path = path.with_suffix(".json")
    try:
        values = json.loads(header_path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} has no {header_path.name} beside it; copy both files of the run.") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{header_path} cannot be read ({error}); copy both files of the run again.") from error
    if not isinstance(values, dict) or values.get("format") != WEIGHTS_FORMAT:
        raise UserError(f"{header_path} does not describe Paceline weights; name a file that a run has written.")
    if values.get("version") != VERSION:
        raise UserError(f"{header_path} is of version {values.get('version')}; this Paceline reads version {VERSION}.")
    return WeightsHeader(
        model=values["model"],
        names=tuple(values["names"]),
        imgsz=values["imgsz"],
        epoch=values["epoch"],
        metrics=values["metrics"],
    )


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Everything of a run at the end of an epoch."""

    tensors: dict[str, Tensor]
    """Keys start with `network.`, `ema.`, `optimizer.` or `engine.`."""
    values: dict[str, Any]


def save_resume_point(path: Path, point: ResumePoint) -> None:
    """Write the file whole or not at all."""
    header = {"format": RESUME_FORMAT, "version": RESUME_VERSION} | point.values
    _write(path, point.tensors, {"paceline": json.dumps(header)})


def load_resume_point(path: Path) -> ResumePoint:
    """Read what `save_resume_point` wrote."""
    if not path.is_file():
        raise UserError(f"{path} does not exist, so this run cannot be resumed; start a new one.")
    tensors, metadata = _read(path)
    values = json.loads(metadata.get("paceline", "{}"))
    if values.get("format") != RESUME_FORMAT or values.get("version") != RESUME_VERSION:
        raise UserError(f"{path} was not written by this version of Paceline; start a new run from its weights.")
    return ResumePoint(tensors=tensors, values=values)


def optimizer_tensors(
    optimizer: Optimizer, network: Module, leaf: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> dict[str, Tensor]:
    """Flatten the optimiser's state: `{the network's key of the parameter}.{name of the entry}`.

    leaf: what the optimiser changes for a parameter of the network.
    """
    return {
        f"{name}.{entry}": sharded_like(parameter, torch.as_tensor(value))
        for name, parameter in network.named_parameters()
        for entry, value in optimizer.state.get(leaf(parameter), {}).items()
        if value is not None
    }


def load_optimizer_tensors(
    optimizer: Optimizer,
    network: Module,
    tensors: Mapping[str, Tensor],
    leaf: Callable[[Tensor], Tensor] = lambda parameter: parameter,
) -> None:
    """Put back what `optimizer_tensors` gave, in place; what belongs to other networks' parameters is passed over."""
    parameters = dict(network.named_parameters())
    for key, value in tensors.items():
        name, entry = key.rsplit(".", 1)
        if name in parameters:
            like = parameters[name].detach()
            optimizer.state[leaf(parameters[name])][entry].copy_(local(laid_out_like(like, value)))


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write from where the tensors lie; made into bytes first, they would need the memory twice, and the GIL."""
    on_host = {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
    with replaced_atomically(path) as temporary:
        try:
            safetensors.torch.save_file(on_host, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise _system_error(error) from error


def _system_error(error: safetensors.SafetensorError) -> OSError:
    """Say it as the system did: its number is at the end of the library's text."""
    found = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else OSError(errno.EIO, str(error))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; check the path.") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is torn or not a safetensors file ({error}); copy it again.") from error
