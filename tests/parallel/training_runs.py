"""Short training runs under any layout, for the tests that compare layouts; runs on every rank."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal
from unittest import mock

import torch
import torch.distributed as dist
from batches import NUM_CLASSES, make_batch, rows
from torch import nn

from paceline.ledger import Ledger
from paceline.losses.config import LossConfig
from paceline.losses.detection import DetectionLoss
from paceline.models.catalogue import find_model
from paceline.models.families import yolo11, yolov8
from paceline.models.heads import DetectionHead
from paceline.models.registry import build_model
from paceline.parallel.data import DataEngine, Replicas, Shards
from paceline.parallel.gather import wire_of
from paceline.parallel.layout import Layout
from paceline.parallel.mesh import Mesh
from paceline.parallel.norms import BatchStatistics
from paceline.parallel.pipeline import PipelineEngine
from paceline.parallel.shards import load_whole_state
from paceline.parallel.single import SingleEngine
from paceline.training.checkpoint import load_optimizer_tensors, optimizer_tensors
from paceline.training.config import OptimConfig
from paceline.training.ema import Ema
from paceline.training.freeze import freeze_nodes
from paceline.training.optim import build_optimizer, plan_optimizer, update

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Engine


@dataclass(frozen=True)
class Run:
    """A few steps on random batches.

    images: of all ranks, per update. parts: into how many micro-batches they are cut, over ranks and time together.
    """

    model: str = "yolov8n"
    engine: Literal["single", "data", "fsdp"] = "single"
    optimizer: Literal["SGD", "AdamW"] = "SGD"
    dtype: torch.dtype = torch.float64
    updates: int = 5
    images: int = 8
    parts: int = 4
    bn: Literal["local", "sync"] = "local"
    clip: float = 10.0
    empty: tuple[int, ...] = ()
    """Images without boxes."""
    gradients: Literal["fp32", "bf16"] = "fp32"
    freeze: int = 0
    stages: int = 1
    shift: int = 0
    """Nodes by which the cuts lie further back than at equal numbers of nodes."""
    device: str = "cpu"
    staged: bool = False
    """Copy what crosses boundaries even where the group could send it as it is."""
    schedule: Literal["gpipe", "1f1b"] = "1f1b"
    drawn: bool = False
    """Images come in [0, 1], as a device draws them, and not as bytes."""
    amp_dtype: torch.dtype | None = None
    halved: bool = True
    """Under autocast: the weights of a node are rounded together."""


class Trainer:
    """Everything that one run trains with."""

    def __init__(self, run: Run) -> None:
        torch.manual_seed(0)
        self.run = run
        network = small_boxes(narrow(run.model)).to(run.device, run.dtype).train()
        self.frozen = freeze_nodes(network, run.freeze)
        self.engine = build(run, network)
        config = OptimConfig(optimizer=run.optimizer, lr0=0.0005)  # where a warm-up is after some steps
        plan = plan_optimizer(config, num_classes=NUM_CLASSES, updates=20_000, effective_batch=64)
        self.optimizer = build_optimizer(plan, self.engine.network, self.engine.parts.leaf)
        self.ema = Ema(self.engine.network, average=self.engine.parts.twin(), ramp_updates=10)
        self.norm = 0.0

    def accumulate(self, number: int, *, completes: bool = True) -> Tensor:
        """Take batch `number`; returns its losses over all ranks."""
        batch = make_batch(self.run.images, seed=number, empty=self.run.empty)
        return self.run_parts(self.parts_of(batch), completes=completes)

    def parts_of(self, batch: Batch) -> list[tuple[Batch, bool]]:
        """This rank's parts of a batch on its device, and whether they are the last."""
        if self.run.drawn:
            batch = replace(batch, images=batch.network_input(self.run.dtype))
        return [(rows(batch, mine).to(self.run.device), last) for mine, last in shares(self.run)]

    def run_parts(self, parts: list[tuple[Batch, bool]], *, completes: bool = True) -> Tensor:
        """Run what `parts_of` gave, which is one batch; returns the losses over all ranks."""
        for module in self.frozen:
            module.eval()
        losses = torch.zeros(4, dtype=self.run.dtype, device=self.run.device)
        for part, last in parts:
            sums = self.engine.accumulate(part, completes=last and completes, share=1 / len(parts))
            losses += torch.stack([sums.box, sums.cls, sums.dfl, sums.normaliser])
        return losses

    def update(self) -> Tensor:
        """Apply what was accumulated; says whether it was not finite."""
        not_finite = self.engine.gradient()
        self.norm = gradient_norm(self.engine)
        update(self.optimizer, not_finite)
        self.ema.update()
        return not_finite

    def state(self) -> dict[str, dict[str, Tensor]]:
        """The whole state, as checkpoints have it."""
        engine, parts = self.engine, self.engine.parts
        parts.settle(engine.network, self.ema.network)
        return {
            "network": copied(parts.whole(engine.network.state_dict())),
            "ema": copied(parts.whole(self.ema.network.state_dict())),
            "optimizer": copied(parts.whole(optimizer_tensors(self.optimizer, engine.network, parts.leaf))),
            "engine": copied(parts.whole(engine.pending())),
        }

    def load(self, state: dict[str, dict[str, Tensor]], updates: int) -> None:
        """Go on from the whole state of a run under any layout."""
        load_whole_state(self.engine.network, state["network"])
        load_whole_state(self.ema.network, state["ema"])
        self.ema.updates = updates
        leaf = self.engine.parts.leaf
        load_optimizer_tensors(self.optimizer, self.engine.network, state["optimizer"], leaf)
        self.engine.load_pending(state["engine"])


def train(run: Run) -> dict[int, dict[str, Any]]:
    """Train as the run says; returns the state after the first and the last update, the same for every right layout."""
    trainer = Trainer(run)
    losses, states = [], {}
    for number in range(1, run.updates + 1):
        whole = mock.patch("paceline.models.operations.half_weights.autocast_type", return_value=None)
        with nullcontext() if run.halved else whole:
            losses.append(trainer.accumulate(number))
        not_finite = trainer.update()
        if number in {1, run.updates}:
            figures = copied({"losses": torch.stack(losses), "not_finite": not_finite})
            states[number] = trainer.state() | {"losses": figures, "norm": trainer.norm}
    return states


def go_on(first: Run, second: Run | None) -> dict[str, dict[str, Tensor]]:
    """Train under one layout, stop with half an update accumulated, go on under another (None: do not stop)."""
    trainer = Trainer(first)
    trainer.accumulate(1)
    trainer.update()
    trainer.accumulate(2, completes=False)
    if second is not None:
        state = trainer.state()
        trainer = Trainer(second)
        trainer.load(state, updates=1)
        again = trainer.state()
        for part, tensors in state.items():
            assert again[part].keys() == tensors.keys(), part
            for key, value in tensors.items():
                torch.testing.assert_close(again[part][key], value, msg=lambda text, key=key: f"{key}: {text}")
    trainer.accumulate(3)
    trainer.update()
    trainer.accumulate(4)
    trainer.update()
    return trainer.state()


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, which later updates do not change."""
    return {key: value.to("cpu", copy=True) for key, value in tensors.items()}


def gradient_norm(engine: Engine) -> float:
    """Norm of what this rank holds of the gradient."""
    gradients = [engine.parts.leaf(value).grad for value in engine.network.parameters()]
    return float(torch.stack([value.norm() for value in gradients if value is not None]).norm())


def narrow(model: str) -> DetectionModel:
    """The smallest size of a family with half its channels: the same nodes and edges, and a quarter of the numbers."""
    scales = {"yolov8": yolov8.SCALES, "yolo11": yolo11.SCALES}[find_model(model).family]
    with mock.patch.dict(scales, n=replace(scales["n"], width=scales["n"].width / 2)):
        return build_model(model, NUM_CLASSES)


def small_boxes(network: DetectionModel) -> DetectionModel:
    """Let a fresh head start with boxes of about three strides, so that many points have a share in the loss."""
    head = network.nodes[-1].module
    assert isinstance(head, DetectionHead)
    with torch.no_grad():
        for branch in head.cv2:
            assert isinstance(branch, nn.Sequential)
            branch[-1].bias.copy_(-torch.linspace(0, 10, network.reg_max).repeat(4))
    return network


def build(run: Run, network: DetectionModel) -> Engine:
    """Put the engine of a run together."""
    criterion = DetectionLoss(LossConfig(), NUM_CLASSES)
    common: dict[str, Any] = {"amp_dtype": run.amp_dtype, "clip": run.clip, "ledger": Ledger()}
    if run.engine == "single":
        return SingleEngine(network, criterion, **common)
    layout = layout_of(run)
    mesh = Mesh.of(
        layout, "cuda" if "nccl" in dist.get_backend_config() else "cpu"
    )  # gloo takes tensors of GPUs in both
    if run.stages > 1:
        nodes = len(network.nodes)
        cuts = tuple(nodes * stage // run.stages + run.shift for stage in range(1, run.stages))
        batch = run.images // layout.replicas
        where = torch.device("cpu") if run.staged else wire_of(torch.device(run.device), mesh.stages)
        with mock.patch("paceline.parallel.pipeline.wire_of", return_value=where):
            return PipelineEngine(network, criterion, mesh, cuts=cuts, batch=batch, size_hw=(64, 64), **common)
    statistics = BatchStatistics(network, group=mesh.norms)
    exchange = (
        Shards(network, mesh.devices["replica"])
        if run.engine == "fsdp"
        else Replicas(network, mesh.replicas, gradients=run.gradients)
    )
    return DataEngine(network, criterion, exchange, statistics, **common)


def layout_of(run: Run) -> Layout:
    """Layout of a run over all ranks of this world."""
    if run.engine == "single":
        return Layout()
    replicas = dist.get_world_size() // run.stages
    return Layout(
        data=1 if run.engine == "fsdp" else replicas,
        shard=replicas if run.engine == "fsdp" else 1,
        pipeline=run.stages,
        microbatches=run.parts // replicas if run.stages > 1 else 1,
        schedule=run.schedule,
        gradients=run.gradients,
        norm_ranks=replicas if run.bn == "sync" else 1,
    )


def shares(run: Run) -> list[tuple[list[int], bool]]:
    """Rows of each batch that this rank accumulates for an update, and whether they are the last.

    Micro-batch p of P has the rows p, p + P, ...; replica r of R has the micro-batches r, r + R, ...
    """
    layout = layout_of(run)
    replica = layout.replica_of(dist.get_rank()) if layout.devices > 1 else 0
    micro = [list(range(part, run.images, run.parts)) for part in range(run.parts)]
    mine = micro[replica :: layout.replicas]
    if run.stages > 1:
        return [([row for part in mine for row in part], True)]
    return [(part, part is mine[-1]) for part in mine]
