"""Understudy: an eager step on copies of a network, an optimiser and an average; what a run has stays as it is."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

from paceline.ledger import Ledger
from paceline.parallel.single import SingleEngine
from paceline.training.ahead import compile_ahead
from paceline.training.compiling import compiles_loss
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.optim import build_optimizer
from paceline.training.plan import laid_out
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion
    from paceline.training.compiling import Compiler
    from paceline.training.optim import OptimPlan
    from paceline.training.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Cast:
    """What the steps of a run are made of, whatever their plan."""

    network: DetectionModel
    criterion: Criterion
    optimizer: OptimPlan
    freeze: int
    """Nodes that are not trained."""
    clip: float


def understudy(
    cast: Cast, precision: Precision, *, channels_last: bool = True, compiler: Compiler | None = None
) -> EagerStep:
    """Make the step of one process, on the device of the network; with a `compiler`, its nodes are compiled."""
    if compiler is None and channels_last:
        compile_ahead(cast.network, cast.criterion, precision.amp_dtype)
    network = laid_out(copy.deepcopy(cast.network), channels_last=channels_last).train()
    for module in freeze_nodes(network, cast.freeze):
        module.eval()
    ledger = Ledger()
    device = next(network.parameters()).device
    engine = SingleEngine(
        network,
        compiler.compile_criterion(cast.criterion) if compiler and compiles_loss(device) else cast.criterion,
        amp_dtype=precision.amp_dtype,
        clip=cast.clip,
        ledger=ledger,
        loss_scale=precision.loss_scale,
    )
    ema = Ema(network)
    if compiler is not None:
        compiler.compile_network(network)
    return EagerStep(engine, build_optimizer(cast.optimizer, network), ema, ledger)
