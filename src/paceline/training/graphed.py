"""The step as a graph: recorded once for each shape of batches, from then on started by the host as one thing.

```
new shape   copy inputs | save state | run, run, run | record | put state back | replay
then        copy inputs | replay                                                            two things for the host
```
A graph has its numbers and its addresses frozen. So every state of a step lies at one place in memory and is changed
there, and what the host decides (rates, share of the average) lies in tensors that are filled before the replay.

Gradients are the one exception, since autograd makes them anew for every update and then adds to them:

```
batches of an update    1                   first of several        in between      last of several
gradients before        none                none                    kept            kept
gradients after         none, all is done   copied to kept          kept            none, all is done
```
Each of the four is a graph of its own; those of an accumulation share the kept gradients, and an update of one batch
pays neither for clearing gradients nor for adding to them.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch

from paceline.batch import Batch
from paceline.models.operations.beside import recorded
from paceline.streams import stream_for

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from torch import Tensor
    from torch.nn import Module

    from paceline.training.schedule import Rates
    from paceline.training.step import EagerStep, StepOutcome

log = logging.getLogger("paceline")

MOST_GRAPHS = 24
"""Shapes have up to four; each holds some MB of the device beside the memory that all of them share."""
WARMUPS = 3
"""Runs before a recording: libraries choose kernels and make workspaces, which must not happen while it lasts."""
WARMUPS_OF_RANKS = 11
"""The same of several ranks before the first recording in which gradients travel: DDP looks at the first ten batches
of that kind more closely, with events that it waits for."""


class Recording(Protocol):
    """Work for the device that was recorded."""

    def replay(self) -> None:
        """Start it; inputs, state and outputs lie where they lay when it was recorded."""


class Capture(Protocol):
    """Records work for a device."""

    def aside(self) -> AbstractContextManager[None]:
        """Surround whatever runs without a graph, and the making of what holds on to where it was made (DDP)."""

    def record(self, work: Callable[[], None]) -> Recording:
        """Record what is started for the device; whether it is also done, and changes the state, is left open."""


class CudaCapture:
    """CUDA graphs that share one pool of memory, recorded on a stream of their own.

    Only calls of the recording thread can spoil a recording: loader threads may lock pages and NCCL's watchdog may
    query its events, neither on this stream (docs/decisions/0050).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Before what runs beside it: gradients of weights, on which nothing waits.
        self._stream = stream_for("recording", device, -1)
        self._pool = torch.cuda.graph_pool_handle()
        if hasattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch"):  # torch 2.11 and later
            # DDP adds up on the stream that records what comes from those of branches; autograd waits for them.
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run what is started inside on the stream that records, after and before that of the caller."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> Recording:
        """Record; nothing is done, and the state stays."""
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with recording, recorded(self._device):
            work()
        return graph


@dataclass(frozen=True)
class _Key:
    """What makes a batch another graph."""

    images: tuple[object, ...]
    boxes: int
    """Room for padded ground truth."""
    adds: bool
    """Whether gradients of earlier batches wait."""
    completes: bool


@dataclass(frozen=True)
class _Graph:
    recording: Recording
    outcome: StepOutcome


class GraphedStep:
    """Takes steps by graphs where it can, and by the eager step where it cannot; the numbers are the same."""

    def __init__(
        self,
        step: EagerStep,
        capture: Capture,
        *,
        largest: Callable[[int], int] | None = None,
        most_graphs: int = MOST_GRAPHS,
        warmups: int = WARMUPS,
    ) -> None:
        """Take over a step whose engine `is_capturable`.

        largest: tells the largest of a number over all ranks, which have to record and exchange at the same steps; it
            is asked when something is recorded, never else. None for one rank.
        most_graphs: what is recorded; batches of further shapes are taken eagerly.
        """
        assert step.engine.is_capturable
        self._step = step
        self._capture = capture
        self._largest = largest
        self._most_graphs = most_graphs
        self._warmups = warmups
        self._graphs: dict[_Key, _Graph | None] = {}
        self._inputs = _Inputs()
        self._room: dict[tuple[object, ...], int] = {}
        self._gradients = _Gradients(step.engine.network)
        self._stopped = False

    def __call__(self, batch: Batch, rates: Rates, *, completes: bool) -> StepOutcome:
        """Take one batch."""
        if completes:
            self._step.set_rates(rates)
        key = self._key(batch, completes=completes)
        if key not in self._graphs:
            self._graphs[key] = self._record(key, batch)
        graph = self._graphs[key]
        if graph is None or batch.boxes.shape[1] > key.boxes:
            with self._capture.aside():  # where DDP works: memory that it lets go is taken again in that order alone
                return self._step.run(batch, completes=completes)
        with self._step.ledger.span("step", on_device=True):
            self._inputs.place(batch, key.boxes)
            if key.adds:
                self._gradients.keep()
            with self._step.engine.unwatched():
                graph.recording.replay()
            if completes:
                self._gradients.drop()
            else:
                self._gradients.restore()
        return graph.outcome

    @property
    def num_graphs(self) -> int:
        """Count what has been recorded."""
        return sum(graph is not None for graph in self._graphs.values())

    def _key(self, batch: Batch, *, completes: bool) -> _Key:
        images = (tuple(batch.images.shape), batch.images.stride(), batch.images.dtype)
        boxes = batch.boxes.shape[1]
        if self._largest is not None:  # ranks have batches of unlike room, and have to record at the same step
            if images not in self._room:
                self._room[images] = self._largest(boxes)
            boxes = self._room[images]
        return _Key(images=images, boxes=boxes, adds=self._gradients.are_there(), completes=completes)

    def _record(self, key: _Key, batch: Batch) -> _Graph | None:
        """Record the graph of a key and leave the state as it is; None where that is not possible."""
        if self._stopped:
            return None
        if self.num_graphs >= self._most_graphs:
            self._stop(batch, f"{self.num_graphs} graphs are recorded already")
            return None
        graph, reason = None, ""
        with self._step.ledger.closed_span("capture"):
            try:
                graph = self._try_to_record(key, batch)
            except RuntimeError as error:  # no memory left among them
                reason = (str(error).splitlines() or [type(error).__name__])[0]
            if self._largest is not None and self._largest(int(graph is None)) and graph is not None:
                graph, reason = None, "another rank could not record it"
        if reason:
            self._stop(batch, reason)
        return graph

    def _try_to_record(self, key: _Key, batch: Batch) -> _Graph:
        step, gradients = self._step, self._gradients
        travelled = any(known.completes for known in self._graphs)
        first_of_ranks = self._largest is not None and key.completes and not travelled
        outcomes: list[StepOutcome] = []

        def work() -> None:
            outcomes.append(step.run(inputs, completes=key.completes))
            if not key.completes:
                gradients.keep()

        def begin() -> None:
            if key.adds:
                gradients.restore()
            else:
                gradients.drop()

        with self._undone(), step.engine.unwatched():
            if key.adds:
                gradients.keep()
            with self._capture.aside():
                inputs = self._inputs.place(batch, key.boxes)
                for _ in range(WARMUPS_OF_RANKS if first_of_ranks else self._warmups):
                    begin()
                    work()
            begin()
            recording = self._capture.record(work)
        return _Graph(recording=recording, outcome=outcomes[-1])

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Put back whatever a step changes inside: its state, the gradients, the random numbers to come."""
        state = self._step.state()
        saved = [value.detach().clone() for value in state]
        gradients = self._gradients.copies()
        device = state[0].device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(state, saved)
            self._gradients.put_back(gradients)

    def _stop(self, batch: Batch, reason: str) -> None:
        self._stopped = True
        height, width = batch.size_hw
        log.warning(
            "Batches of %d images of %d x %d px with room for %d boxes, and of any other shape that has no graph yet, "
            "are taken without one: %s.",
            len(batch),
            width,
            height,
            batch.boxes.shape[1],
            reason,
        )


def graphed(
    step: EagerStep, capture: Capture | None, *, largest: Callable[[int], int] | None = None
) -> EagerStep | GraphedStep:
    """Let `capture`, where there is one, record a step; where its engine cannot be, say so and leave it eager."""
    if capture is None:
        return step
    if not step.engine.is_capturable:
        log.info("No graphs: with this layout and this exchange of gradients the host takes part in every step.")
        return step
    return GraphedStep(step, capture, largest=largest)


class _Inputs:
    """Where graphs find their batches; shapes that differ in the room for boxes alone share their images."""

    def __init__(self) -> None:
        self._places: dict[tuple[object, ...], Tensor] = {}

    @torch.no_grad()
    def place(self, batch: Batch, room: int) -> Batch:
        """Copy a batch to where graphs with this room for boxes find it; boxes beyond it are left out."""
        placed: dict[str, Tensor] = {}
        for field in fields(batch):
            value: Tensor = getattr(batch, field.name)
            if field.name not in _PADDED:
                placed[field.name] = self._place(field.name, value).copy_(value)
                continue
            place = self._place(field.name, value.new_empty((len(value), room, *value.shape[2:]), device="meta"), value)
            boxes = min(room, value.shape[1])
            place[:, :boxes].copy_(value[:, :boxes])
            place[:, boxes:].zero_()
            placed[field.name] = place
        return Batch(**placed)

    def _place(self, name: str, like: Tensor, beside: Tensor | None = None) -> Tensor:
        key = (name, tuple(like.shape), like.stride(), like.dtype)
        if key not in self._places:
            self._places[key] = torch.empty_like(like, device=(like if beside is None else beside).device)
        return self._places[key]


_PADDED = frozenset({"boxes", "labels", "valid"})


class _Gradients:
    """The gradients of a network: where those of an accumulation are kept between its batches."""

    def __init__(self, network: Module) -> None:
        self._parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        self._kept: dict[Tensor, Tensor] = {}

    def are_there(self) -> bool:
        """Whether gradients of earlier batches wait."""
        return any(parameter.grad is not None for parameter in self._parameters)

    @torch.no_grad()
    def keep(self) -> None:
        """Bring what there is to where it is kept."""
        kept, found = [], []
        for parameter in self._parameters:
            if parameter.grad is None:
                continue
            if parameter not in self._kept:
                self._kept[parameter] = torch.empty_like(parameter.grad)
            if parameter.grad is not self._kept[parameter]:
                kept.append(self._kept[parameter])
                found.append(parameter.grad)
        if kept:
            torch._foreach_copy_(kept, found)
        self.restore()

    def restore(self) -> None:
        """Take what is kept for the gradients."""
        for parameter, kept in self._kept.items():
            parameter.grad = kept

    def drop(self) -> None:
        """Have none."""
        for parameter in self._parameters:
            parameter.grad = None

    def copies(self) -> list[Tensor | None]:
        """Return copies of what there is."""
        return [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]

    def put_back(self, copies: list[Tensor | None]) -> None:
        """Put back what `copies` gave."""
        for parameter, gradient in zip(self._parameters, copies, strict=True):
            parameter.grad = gradient
