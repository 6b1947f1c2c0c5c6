"""Weights: tensors of a checkpoint moved into a network, as far as they fit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TransferReport:
    """Which keys of a checkpoint found their place; every tuple in the order of its source."""

    kept: tuple[str, ...]
    """Copied into the network."""
    left_out: tuple[str, ...]
    """In the checkpoint, but unknown to the network or of another shape there."""
    missing: tuple[str, ...]
    """In the network, which keeps its own values there."""


@torch.no_grad()
def transfer(model: nn.Module, state: Mapping[str, Tensor]) -> TransferReport:
    """Copy into `model` every tensor of `state` whose key and shape fit, cast to the model's type and device.

    With another number of classes that leaves out the last class convolutions, and the class branches before them
    only where their width follows the number of classes (the two smallest sizes, see `DetectionHead`).
    """
    own = model.state_dict()
    kept = tuple(key for key, tensor in state.items() if key in own and own[key].shape == tensor.shape)
    for key in kept:
        own[key].copy_(state[key])
    taken = set(kept)
    return TransferReport(
        kept=kept,
        left_out=tuple(key for key in state if key not in taken),
        missing=tuple(key for key in own if key not in taken),
    )
