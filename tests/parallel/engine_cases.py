"""What the ranks of a world do in the tests of engines."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from batches import NUM_CLASSES, make_batch
from training_runs import Run, Trainer, layout_of, small_boxes

from paceline.commands.evaluation import evaluate_network
from paceline.data.config import DataConfig
from paceline.data.dataset import open_data_set
from paceline.data.loader import EvalLoader
from paceline.errors import UserError
from paceline.evaluation.config import PostprocessConfig
from paceline.models.registry import build_model
from paceline.parallel.feed import Feed
from paceline.parallel.mesh import Mesh
from paceline.parallel.parts import StageParts, skeleton_of
from paceline.parallel.pipeline import targets_of
from paceline.parallel.shards import local

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from paceline.batch import Batch
    from paceline.data.index import Index


def from_all(value: Any) -> list[Any]:
    """Collect a value from every rank."""
    values: list[Any] = [None] * (dist.get_world_size() if dist.is_initialized() else 1)
    if not dist.is_initialized():
        return [value]
    dist.all_gather_object(values, value)
    return values


def bytes_held(run: Run) -> list[int]:
    """Bytes of parameters, gradients and optimiser state of each rank, after an update and the next backward pass."""
    trainer = Trainer(run)
    trainer.accumulate(1)
    trainer.update()
    trainer.accumulate(2)
    trainer.engine.gradient()
    network, leaf = trainer.engine.network, trainer.engine.parts.leaf
    tensors = [local(value.detach()) for value in network.parameters()]
    gradients = [leaf(value).grad for value in network.parameters()] + [value.grad for value in network.parameters()]
    tensors += [local(value) for value in gradients if value is not None]
    tensors += [value for state in trainer.optimizer.state.values() for value in state.values() if value is not None]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return from_all(sum(storages.values()))


class _Kept:
    """A tensor that waits for its backward pass."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def peak_of_activations(run: Run) -> list[int]:
    """Most tensors that wait for a backward pass at one time, on each rank."""
    trainer = Trainer(run)
    live, peak = 0, 0

    def forget() -> None:
        nonlocal live
        live -= 1

    def keep(tensor: torch.Tensor) -> _Kept:
        nonlocal live, peak
        live += 1
        peak = max(peak, live)
        kept = _Kept(tensor)
        weakref.finalize(kept, forget)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        trainer.accumulate(1)
    assert live == 0
    return from_all(peak)


def another_shape(run: Run) -> list[tuple[str, ...]]:
    """What each rank says to a batch of another number of images, and to one of another size."""
    trainer = Trainer(run)
    trainer.accumulate(1)
    refusals = []
    for batch in (make_batch(run.images // 2), make_batch(run.images, size=96)):
        try:
            trainer.engine.accumulate(batch)
        except UserError as error:
            refusals.append(str(error))
    trainer.accumulate(2)
    assert float(trainer.update()) == 0.0
    return from_all(tuple(refusals))


def not_finite(run: Run) -> list[tuple[float, float, bool]]:
    """Poison the last rank alone; returns its verdicts, and whether parameters stayed, on each rank."""
    trainer = Trainer(run)
    trainer.accumulate(1)
    finite = float(trainer.update())
    before = [local(value.detach()).clone() for value in trainer.engine.network.parameters()]
    is_last = dist.get_rank() == dist.get_world_size() - 1
    network = trainer.engine.network
    if is_last and run.stages == 1:
        with torch.no_grad():
            next(network.parameters()).view(-1)[0] = float("nan")
        before[0] = next(network.parameters()).detach().clone()
    trainer.accumulate(2)
    if is_last and run.stages > 1:
        gradient = next(value.grad for value in network.parameters() if value.grad is not None)
        gradient.view(-1)[0] = float("inf")
    verdict = float(trainer.update())
    after = [local(value.detach()) for value in trainer.engine.network.parameters()]
    stayed = all(torch.equal(mine.nan_to_num(), old.nan_to_num()) for mine, old in zip(after, before, strict=True))
    return from_all((finite, verdict, stayed))


class _Source:
    """Batches with different numbers of boxes."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.batch_size = len(batches[0])

    def steps(self, epoch: int) -> int:
        return len(self.batches)

    def epoch(self, epoch: int, *, mosaic: bool) -> Iterator[Batch]:
        assert dist.get_rank() == 0, "only the first stage loads"
        yield from self.batches

    def stats(self) -> dict[str, float]:
        return {}


def feed(world: int) -> list[list[tuple[tuple[int, ...], torch.Tensor]]]:
    """What arrives on each rank of one pipeline: the images' shape and the ground truth, of every batch."""
    batches = [make_batch(4, boxes=boxes, seed=boxes) for boxes in (1, 4, 7)]
    mesh = Mesh.of(layout_of(Run(engine="data", stages=world)), "cpu")
    fed = Feed(_Source(batches), mesh, torch.device("cpu"))
    assert fed.batch_size == 4
    assert fed.steps(0) == 3
    return from_all([(tuple(batch.images.shape), targets_of(batch)) for batch in fed.epoch(0, mosaic=False)])


def val_index(data: Path) -> Index:
    """The images that are evaluated."""
    index = open_data_set(DataConfig(data=str(data)), seed=0).val
    assert index is not None
    return index


def evaluate(
    data: Path, *, world: int, stages: int = 1, whole: bool = True, batch: int = 4, stopping: int = -1
) -> list[Any]:
    """Evaluate a network on all ranks; returns figures and detections on the first rank, None on the others.

    stopping: the rank that stops before its second batch.
    """
    torch.manual_seed(0)
    network = small_boxes(build_model("yolo11n", NUM_CLASSES - 1)).eval()
    share = (dist.get_rank(), world) if world > 1 else (0, 1)
    answering: torch.nn.Module = network
    if stages > 1:
        mesh = Mesh.of(replace(layout_of(Run(engine="data", stages=stages)), microbatches=stages), "cpu")
        nodes = len(network.nodes)
        cuts = tuple(nodes * stage // stages for stage in range(1, stages))
        edges = (0, *cuts, nodes)
        segment = network.segment(edges[mesh.stage], edges[mesh.stage + 1])
        parts = StageParts(segment, skeleton_of(network), mesh, cuts=cuts, evaluates_whole=whole)
        answering = parts.assemble(parts.twin())
        share = share if whole else (mesh.replica, mesh.layout.replicas)
    index, asked = val_index(data), iter(range(100))
    with EvalLoader(index, 64, batch=batch, workers=1, rank=share[0], world=share[1]) as batches:
        found = evaluate_network(
            answering,
            batches,
            index,
            PostprocessConfig(conf=1e-5, max_det=30),
            device=torch.device("cpu"),
            amp_dtype=None,
            stops=lambda: world > 1 and dist.get_rank() == stopping and next(asked) > 0,
        )
    return from_all(None if found is None else (found.record, found.detections))
