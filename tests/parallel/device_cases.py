"""What runs on any device: engines over ranks against the single one, and steps that never wait for the device."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.distributed as dist
from batches import make_batch
from comparison import assert_same_run, single_of
from recorder import Recorder, Recording
from steps import run as run_steps
from steps import works
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training_runs import Run, Trainer, train

from paceline.ledger import Ledger
from paceline.losses.detection import DetectionLoss
from paceline.parallel.gather import largest
from paceline.training.graphed import CudaCapture, GraphedStep
from paceline.training.optim import update
from paceline.training.step import EagerStep

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager


def as_one_process(run: Run) -> dict[str, Any]:
    """Train under a layout, compare with one process on the same device; returns what shows that it was done."""
    found = train(run)
    if dist.get_rank() == 0:
        alone = single_of(run)
        exact = train(replace(alone, dtype=torch.float64)) if run.dtype is torch.float32 else None
        assert_same_run(found, train(alone), run, exact)
    return {"updates": sorted(found), "backend": dist.get_backend_config(), "device": run.device}


def steps_under(guard: AbstractContextManager[Any], run: Run) -> tuple[float, float]:
    """Two updates, the second under a guard; returns the sum of its losses, and whether it was not finite."""
    trainer = Trainer(run)
    batches = [trainer.parts_of(make_batch(run.images, seed=number)) for number in (1, 2)]
    trainer.run_parts(batches[0])  # libraries choose their kernels, and buffers are made
    trainer.update()
    with guard:
        losses = trainer.run_parts(batches[1])
        not_finite = trainer.engine.gradient()
        update(trainer.optimizer, not_finite)
    return float(losses.sum()), float(not_finite)


class NeverWaits(TorchDispatchMode):
    """Refuses operations for which the host would have to wait for a device, on whatever device they are."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
        repeats = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name in self.WAITING or by_mask or repeats:
            raise RuntimeError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


class Reruns:
    """A graph that does its work again, on the host: the same exchanges on all ranks, at the same addresses."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.replay = work


class Rerunner:
    """Records by remembering what to call."""

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def record(self, work: Callable[[], None]) -> Reruns:
        work()
        return Reruns(work)


class RecordingOfRanks(Recording):
    """What ranks exchange belongs to it: it is done again, and waited for, in the order in which it was begun."""

    waits = ("nonzero", "equal")  # DDP reads tensors of the host, for which nothing waits

    def settle(self, result: Any) -> None:
        """Wait for an exchange, as a device's stream does before it goes on."""
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.ScriptObject) and "c10d" in str(leaf._type()):
                dist.Work.unbox(leaf).wait()


def ddp_by_frozen_addresses() -> dict[str, Any]:
    """The same on a recorder, which knows nothing of what DDP does on the host and where it has put its gradients.

    Returns how many graphs there were, how many exchanges each holds, and how far the state is from the eager one.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    run, asked = Run(engine="data", parts=world), works(30, boxes=(4, 4 + rank, 7 - rank))
    recorder = Recorder(RecordingOfRanks)
    steps: list[EagerStep] = []
    for recorded in (False, True):
        with mock.patch("training_runs.DetectionLoss", partial(DetectionLoss, fixed_shapes=True)):
            trainer = Trainer(run)
        steps.append(EagerStep(trainer.engine, trainer.optimizer, trainer.ema, Ledger()))
        trainer.engine.is_capturable = True
        run_steps(GraphedStep(steps[-1], recorder, largest=largest) if recorded else steps[-1], asked)
    pairs = zip(steps[0].state(), steps[1].state(), strict=True)
    exchanges = [sum("c10d" in str(call[0]) for call in recording.calls) for recording in recorder.recordings]
    return {
        "exchanges": exchanges,
        "difference": max(
            float((one.detach() - other.detach()).double().abs().max()) for one, other in pairs if one.numel()
        ),
    }


def ddp_by_graphs(device: str) -> dict[str, Any]:
    """Steps of a copy per rank eagerly, by graphs, and by graphs for the first shape alone.

    Each rank has a share of the images, in batches with unlike room for boxes. Returns how many graphs there were, and
    how far each run's state is from the eager one's.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    capture = CudaCapture(torch.device(device)) if device == "cuda" else Rerunner()
    run, asked = Run(engine="data", device=device, parts=world), works(30, device=device, boxes=(4, 4 + rank, 7 - rank))
    states: list[list[torch.Tensor]] = []
    counts: list[int] = []
    for most_graphs in (0, 24, 1):
        with capture.aside() if most_graphs else nullcontext():  # DDP holds on to the stream that it was made on
            trainer = Trainer(run)
        eager = EagerStep(trainer.engine, trainer.optimizer, trainer.ema, Ledger())
        step: EagerStep | GraphedStep = eager
        if most_graphs:
            assert trainer.engine.is_capturable == (device == "cuda"), "gloo has the host take part"
            trainer.engine.is_capturable = True
            step = GraphedStep(eager, capture, largest=largest, most_graphs=most_graphs)
        run_steps(step, asked)
        states.append([value.detach().clone() for value in eager.state()])
        counts.append(step.num_graphs if isinstance(step, GraphedStep) else 0)
    differences = [
        max(
            float((one.double() - other.double()).abs().max())
            for one, other in zip(state, states[0], strict=True)
            if one.numel()
        )
        for state in states[1:]
    ]
    return {"graphs": counts[1:], "differences": differences}
