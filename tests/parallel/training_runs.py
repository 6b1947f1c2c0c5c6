"""Short training runs under any layout, for the tests that compare layouts; runs on every rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from batches import NUM_CLASSES, make_batch, rows
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.heads import DetectionHead
from paceline.models.registry import build_model
from paceline.parallel.data import DataEngine, Replicas, Shards
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.single import SingleEngine
from paceline.training.checkpoint import optimizer_tensors
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.optim import build_optimizer, plan_optimizer, update

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Engine


@dataclass(frozen=True)
class Run:
    """A few steps on random batches.

    images: of all ranks, per update. parts: into how many micro-batches they are cut, over ranks and time together.
    """

    model: str = "yolov8n"
    engine: Literal["single", "data", "fsdp", "pipeline", "hybrid"] = "single"
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    dtype: torch.dtype = torch.float64
    updates: int = 5
    images: int = 8
    parts: int = 4
    bn: Literal["local", "sync"] = "local"
    clip: float = 10.0
    empty: tuple[int, ...] = ()
    """Images without boxes."""
    stages: int = 1
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    gradients: Literal["fp32", "bf16"] = "fp32"


def train(run: Run) -> dict[int, dict[str, Any]]:
    """Train as the run says; returns the state after the first and the last update, the same for every right layout."""
    torch.manual_seed(0)
    network = small_boxes(build_model(run.model, NUM_CLASSES)).to(run.dtype).train()
    engine = build(run, network)
    parts = engine.parts
    config = OptimConfig(optimizer=run.optimizer, lr0=0.0005)  # where a warm-up is after some steps
    plan = plan_optimizer(config, num_classes=NUM_CLASSES, updates=20_000, effective_batch=64)
    optimizer = build_optimizer(plan, engine.network, parts.leaf)
    ema = Ema(engine.network, average=parts.twin(), ramp_updates=10)
    losses, states = [], {}
    for number in range(1, run.updates + 1):
        batch = make_batch(run.images, seed=number, empty=run.empty)
        sums = [engine.accumulate(rows(batch, mine), completes=last) for mine, last in shares(run)]
        losses.append(torch.stack([torch.stack([s.box, s.cls, s.dfl, s.normaliser]) for s in sums]).sum(0))
        not_finite = engine.gradient()
        norm = gradient_norm(engine, parts.leaf)
        update(optimizer, not_finite)
        ema.update()
        if number in {1, run.updates}:
            parts.settle(engine.network, ema.network)
            states[number] = {
                "losses": {"losses": torch.stack(losses), "not_finite": not_finite},
                "network": copied(parts.whole(engine.network.state_dict())),
                "ema": copied(parts.whole(ema.network.state_dict())),
                "optimizer": copied(parts.whole(optimizer_tensors(optimizer, engine.network, parts.leaf))),
                "norm": norm,
            }
    return states


def small_boxes(network: DetectionModel) -> DetectionModel:
    """Let a fresh head start with boxes of about three strides, so that many points have a share in the loss."""
    head = network.nodes[-1].module
    assert isinstance(head, DetectionHead)
    with torch.no_grad():
        for branch in head.cv2:
            assert isinstance(branch, nn.Sequential)
            branch[-1].bias.copy_(-torch.linspace(0, 10, network.reg_max).repeat(4))
    return network


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies, which later updates do not change."""
    return {key: value.clone() for key, value in tensors.items()}


def gradient_norm(engine: Engine, leaf: Callable[[Tensor], Tensor]) -> float:
    """Norm of what this rank holds of the gradient."""
    gradients = [leaf(value).grad for value in engine.network.parameters()]
    return float(torch.stack([value.norm() for value in gradients if value is not None]).norm())


def build(run: Run, network: DetectionModel) -> Engine:
    """Put the engine of a run together."""
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES)
    common: dict[str, Any] = {"amp_dtype": None, "clip": run.clip, "ledger": Ledger()}
    if run.engine == "single":
        return SingleEngine(network, criterion, **common)
    group = dist.group.WORLD
    assert group is not None
    statistics = BatchStatistics(network, group=group if run.bn == "sync" else None)
    if run.engine == "data":
        exchange: Any = Replicas(network, group, gradients=run.gradients)
    else:
        exchange = Shards(network, init_device_mesh("cpu", (dist.get_world_size(),)))
    return DataEngine(network, criterion, exchange, statistics, **common)


def shares(run: Run) -> list[tuple[list[int], bool]]:
    """Rows of each batch that this rank accumulates for an update, and whether it is the last.

    Micro-batch p of P has the rows p, p + P, ...; replica r of R has the micro-batches r, r + R, ...
    """
    world = 1 if run.engine == "single" else dist.get_world_size()
    rank = 0 if run.engine == "single" else dist.get_rank()
    micro = [list(range(part, run.images, run.parts)) for part in range(run.parts)]
    mine = micro[rank::world]
    return [(part, part is mine[-1]) for part in mine]
