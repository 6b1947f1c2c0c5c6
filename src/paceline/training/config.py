"""What a user may set about optimisation and the training loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser, learning-rate schedule and gradient handling."""

    optimizer: Literal["auto", "SGD", "AdamW"] = "auto"
    """`auto` takes AdamW with a rate from the number of classes for short runs, SGD for long ones."""
    lr0: float = 0.01
    """First learning rate; with `optimizer=auto` it is set by the rule of that option."""
    lrf: float = 0.01
    """Last learning rate, as a share of the first."""
    momentum: float = 0.937
    """SGD momentum, or the first beta of AdamW."""
    weight_decay: float = 0.0005
    """Decay of weights (never of biases and norms)."""
    warmup_epochs: float = 3.0
    """Epochs over which the learning rate rises from 0."""
    warmup_momentum: float = 0.8
    """SGD momentum at the start of the warm-up."""
    warmup_bias_lr: float = 0.1
    """SGD learning rate of biases at the start of the warm-up."""
    cos_lr: bool = False
    """Cosine decay instead of linear."""
    nbs: int = 64
    """Nominal batch: gradients of smaller batches are accumulated up to it."""
    clip: float = 10.0
    """Largest norm of the gradient; 0 turns clipping off."""


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length and habits of a run."""

    epochs: int = 100
    """Passes over the training images."""
    time: str = ""
    """Time budget such as `30m`, `2h` or `1.5` (hours): the schedule fits as many epochs as go into it."""
    patience: int = 100
    """Stop after this many epochs without a better AP; 0 never stops early."""
    seed: int = 0
    """Seed of the weights, the order and the augmentation."""
    amp: Literal["auto", "off", "bf16", "fp16"] = "auto"
    """Mixed precision; `auto` takes the fastest of those that the device has, see `tune_step`."""
    tune_step: Literal["off", "quick", "full"] = "quick"
    """How a step is carried out fastest here is measured at the start: `quick` in a few seconds, precision, memory
    layout and threads; `full` compilation and CUDA graphs too; `off` takes the defaults. The next run remembers."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, the number of a GPU, or several (`0,1`): one process trains on each."""
    resume: str = ""
    """Run folder to go on from, `true` for the newest one, or `auto`: the run `name`, begun or not."""
    pretrained: bool = True
    """Start from the weights that `model` names, when it is a file."""
    freeze: int = 0
    """Do not train the first this many nodes of the network."""
    val: bool = True
    """Evaluate while training; the last epoch is always evaluated."""
    val_interval: int = 1
    """Evaluate after every so many epochs."""
    val_async: bool = False
    """Evaluate a copy of the weights while training goes on; figures arrive an epoch or more later."""
    save_period: int = -1
    """Keep the weights of every this many epochs as well; -1 keeps last and best only."""
    plots: bool = True
    """Draw pictures and curves."""
    deterministic: bool = False
    """Only use algorithms that give the same bits every time, even where they are slower."""
