"""Optimisers: which one, for which parameters, with which rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from paceline.training.adamw import AdamW
from paceline.training.sgd import Sgd

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from paceline.training.config import OptimConfig
    from paceline.training.optimizer import Optimizer

LONG_RUN_UPDATES = 10_000
"""Runs of more updates than this take SGD under `optimizer=auto`."""


@dataclass(frozen=True, kw_only=True)
class OptimPlan:
    """An optimiser with everything that was left open in the options decided."""

    name: Literal["SGD", "AdamW"]
    lr0: float
    momentum: float
    warmup_momentum: float
    warmup_bias_lr: float
    weight_decay: float
    nesterov: bool = True

    def __str__(self) -> str:
        return f"{self.name} (lr {self.lr0:g}, momentum {self.momentum:g}, weight decay {self.weight_decay:g})"


def plan_optimizer(config: OptimConfig, *, num_classes: int, updates: int, effective_batch: int) -> OptimPlan:
    """Decide what `optimizer=auto` leaves open.

    updates: optimiser updates of the whole run, at the nominal batch.
    effective_batch: images per update; the weight decay grows with it over the nominal batch, as its pull per image
        is to stay the same.
    """
    decay = config.weight_decay * effective_batch / config.nbs
    if config.optimizer == "auto" and updates <= LONG_RUN_UPDATES:
        return OptimPlan(
            name="AdamW",
            lr0=round(0.002 * 5 / (4 + num_classes), 6),
            momentum=0.9,
            warmup_momentum=0.9,
            warmup_bias_lr=0.0,
            weight_decay=decay,
        )
    if config.optimizer == "AdamW":
        return OptimPlan(
            name="AdamW",
            lr0=config.lr0,
            momentum=config.momentum,
            warmup_momentum=config.momentum,
            warmup_bias_lr=0.0,
            weight_decay=decay,
        )
    return OptimPlan(
        name="SGD",
        lr0=config.lr0,
        momentum=config.momentum,
        warmup_momentum=config.warmup_momentum,
        warmup_bias_lr=config.warmup_bias_lr,
        weight_decay=decay,
    )


def parameter_groups(network: nn.Module) -> dict[str, list[Tensor]]:
    """Sort the trainable parameters: `weight` decays; `norm` (of normalisations) and `bias` do not."""
    groups: dict[str, list[Tensor]] = {"weight": [], "norm": [], "bias": []}
    for module in network.modules():
        is_norm = isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm | nn.GroupNorm)
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            groups["bias" if name == "bias" else "norm" if is_norm else "weight"].append(parameter)
    return groups


def build_optimizer(
    plan: OptimPlan, network: nn.Module, leaf: Callable[[Tensor], Tensor] = lambda parameter: parameter
) -> Optimizer:
    """Make the optimiser, fused, with one group per kind of parameter; each group keeps its `name`.

    Its rates are tensors beside the parameters, and its state is there from the start; both are changed in place.

    leaf: what the optimiser has to change for a parameter of the network; see `paceline.parallel.parts`.
    """
    groups = [
        {
            "params": [leaf(parameter) for parameter in parameters],
            "name": name,
            "weight_decay": plan.weight_decay if name == "weight" else 0.0,
        }
        for name, parameters in parameter_groups(network).items()
        if parameters
    ]
    if plan.name == "SGD":
        return Sgd(groups, lr=plan.lr0, momentum=plan.momentum, nesterov=plan.nesterov)
    return AdamW(groups, lr=plan.lr0, betas=(plan.momentum, 0.999))


def update(optimizer: Optimizer, not_finite: Tensor) -> None:
    """Apply the gradients and clear them; where `not_finite` is 1.0 the device skips the update by itself."""
    optimizer.found_inf = not_finite.to(torch.float32)
    optimizer.step()
    optimizer.zero_grad()
