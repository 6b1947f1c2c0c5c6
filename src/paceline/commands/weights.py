"""From what the user calls a model to a network with weights."""

from __future__ import annotations

import difflib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from paceline.errors import UserError
from paceline.models.catalogue import find_model, model_names
from paceline.models.registry import build_model
from paceline.models.weights import transfer
from paceline.training.checkpoint import load_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from paceline.models.graph import DetectionModel

log = logging.getLogger("paceline")

_EXPORTED = frozenset({".onnx", ".engine", ".torchscript", ".tflite", ".mlpackage", ".mlmodel", ".pb", ".mnn", ".xml"})
"""Endings of what other YOLO trainers export to."""


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """A network and what is known of it."""

    network: DetectionModel
    model: str
    """Name of the architecture."""
    names: tuple[str, ...]
    """Class names; empty for an architecture without weights."""
    imgsz: int | None
    """Side of the images that the weights were trained on, in pixels."""
    source: Path | None
    """File of the weights, None for an architecture by name."""


def find_weights(model: str) -> Path | None:
    """Return the weights file that `model` names, or None when it names an architecture.

    A run folder stands for its best weights. Raises UserError for anything that is neither.
    """
    path = Path(model)
    if not model.strip():
        raise UserError("No model is named; write model=yolo11n, or name the folder of a run.")
    if path.suffix == ".pt":
        raise _no_pickle(path)
    if path.suffix in _EXPORTED:
        raise UserError(f"{path} is an exported network, which is not read; name a run of Paceline, or its weights.")
    if path.suffix in {".yaml", ".yml"}:
        if path.exists() or (len(path.parts) > 1 and path.stem not in model_names()):
            raise UserError(
                f"Networks are not built from files such as {path}; choose one of {', '.join(model_names())}."
            )
        return None
    if path.is_dir():
        candidates = [path / "weights" / "best.safetensors", path / "best.safetensors"]
        found = [candidate for candidate in candidates if candidate.is_file()]
        if not found:
            raise UserError(f"The folder {path} holds no weights/best.safetensors; name a finished run's folder.")
        return found[0]
    if path.is_file() or path.suffix == ".safetensors" or len(path.parts) > 1:
        if not path.is_file():
            raise UserError(f"The weights {path} do not exist; check the path.")
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file; name the weights of a Paceline run.")
        return path
    return None


def _no_pickle(path: Path) -> UserError:
    """Say what to name instead of the weights of other trainers: those of a run where it is one, else a network."""
    own = path.with_suffix(".safetensors")
    if own.is_file():
        return UserError(f"The weights of a run are no .pt file here; write model={own}.")
    name = _nearest_model(path.stem.lower())
    return UserError(
        f"{path} is a PyTorch pickle, which Paceline cannot read yet; name the architecture (model={name}) to train "
        "from scratch, or a .safetensors file of a Paceline run."
    )


def _nearest_model(stem: str) -> str:
    """Name the network that weights of others are nearest to: `yolov8s` for `yolov8s-seg` or `yolov5s`, say."""
    starts = [name for name in model_names() if stem.startswith(name)]
    close = starts or difflib.get_close_matches(stem, model_names(), n=1, cutoff=0.8)
    return close[0] if close else "yolo11n"


def require_model(model: str) -> None:
    """Raise UserError unless `model` names weights that are there, or a network that is known; loads nothing."""
    if find_weights(model) is None:
        find_model(_architecture(model))


def _architecture(model: str) -> str:
    """Name of the network, also where it is written like a file of the reference (`yolo11n.yaml`)."""
    return Path(model).stem if model.endswith((".yaml", ".yml")) else model


def load_network(model: str, names: Sequence[str] | None, *, pretrained: bool = True) -> LoadedNetwork:
    """Build the network that `model` names, for the classes `names`; None keeps the classes of the weights.

    Weights made for other classes are taken over as far as they fit, and the log says what was left out.
    """
    source = find_weights(model)
    if source is None:
        if names is None:
            raise UserError(
                f"model={model} names an architecture without weights; name the weights of a run, "
                "such as runs/train/weights/best.safetensors."
            )
        name = _architecture(model)
        network = build_model(name, len(names))
        return LoadedNetwork(network=network, model=name, names=(), imgsz=None, source=None)
    tensors, header = load_weights(source)
    own_names = tuple(names) if names is not None else header.names
    network = build_model(header.model, len(own_names))
    if pretrained:
        report = transfer(network, tensors)
        if names is None and (report.left_out or report.missing):
            raise UserError(f"{source} does not fit {header.model} with {len(own_names)} classes; copy the file again.")
        if report.left_out:
            log.info(
                "Weights of %s: %d of %d tensors taken over; left out, as they are made for %d classes: %s.",
                source,
                len(report.kept),
                len(tensors),
                len(header.names),
                _summary(report.left_out),
            )
        else:
            log.info("Weights of %s: all %d tensors taken over.", source, len(report.kept))
    return LoadedNetwork(network=network, model=header.model, names=header.names, imgsz=header.imgsz, source=source)


def _summary(keys: Sequence[str], most: int = 4) -> str:
    shown = ", ".join(keys[:most])
    return shown if len(keys) <= most else f"{shown} and {len(keys) - most} more"
