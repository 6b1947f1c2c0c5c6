"""The roofline: how long a step takes on a device whose arithmetic and memory are used as far as they go.

A step is a list of passes over memory; each takes the longer of its arithmetic and its traffic, and none overlaps
another. Passes of a convolution with a batch norm, in numbers of its input x, output y and activation z per image:

```
forward    convolution        x -> y            operations, x + y + weights
           norm, activation   y -> y -> z       3 y: statistics, then one kernel
backward   norm, activation   z' y -> z' y -> y'    5 y: two sums, then one kernel
           data gradient      y' -> x'          operations, y + x + weights; none for the images
           weight gradient    x y' -> w'        operations, x + y + weights
```

So norm and activation are one kernel per direction beside the convolution's own, which is what compilers make of them.
Joining, splitting, pooling and adding maps cost nothing here: a perfect implementation would not touch memory for them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from paceline.models.statistics import Arithmetic

PARTS = ("forward", "loss", "backward", "optimiser", "ema")
"""Parts of a step, in the order in which they run."""
ATTAINABLE_ARITHMETIC = 0.6
"""Share of the matrix rate that convolutions of a detector's shapes reach in well-made kernels."""
ATTAINABLE_BANDWIDTH = 0.8
"""Share of the copy bandwidth that passes with several streams reach."""
FLASH_BACKWARD = 2.5
"""Operations of attention backward over forward where the scores are computed again (arXiv 2205.14135)."""
MASTER_BYTES = 4
"""Bytes of a weight, its gradient, the optimiser's state and the average, which stay in float32."""


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a device does at most."""

    operations_per_s: float
    """Of matrix products, in the type that is computed in."""
    bytes_per_s: float
    """Read and written."""

    def attainable(self) -> Rates:
        """Return what good kernels reach of it."""
        return Rates(
            operations_per_s=ATTAINABLE_ARITHMETIC * self.operations_per_s,
            bytes_per_s=ATTAINABLE_BANDWIDTH * self.bytes_per_s,
        )


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One kernel's work for a batch."""

    operations: float = 0.0
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the longer of what arithmetic and traffic take."""
        return max(self.operations / rates.operations_per_s, self.bytes / rates.bytes_per_s)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """What a step of a batch asks of a device."""

    images: int
    parts: Mapping[str, tuple[Pass, ...]]
    """Passes by part of the step, see `PARTS`."""
    nodes: Mapping[int, tuple[Pass, ...]]
    """Those of forward and backward by the node of the graph that they belong to."""

    @property
    def operations(self) -> float:
        """All arithmetic."""
        return sum(entry.operations for entry in self._passes())

    @property
    def bytes(self) -> float:
        """All traffic."""
        return sum(entry.bytes for entry in self._passes())

    def seconds(self, rates: Rates) -> float:
        """Return what the whole step takes."""
        return seconds_of(self._passes(), rates)

    def memory_share(self, rates: Rates) -> float:
        """Return the share of these seconds in passes that wait for memory rather than for arithmetic."""
        waiting = (p for p in self._passes() if p.bytes / rates.bytes_per_s > p.operations / rates.operations_per_s)
        return seconds_of(waiting, rates) / self.seconds(rates)

    def _passes(self) -> Iterable[Pass]:
        return (entry for passes in self.parts.values() for entry in passes)


def seconds_of(passes: Iterable[Pass], rates: Rates) -> float:
    """Return what passes take one after the other."""
    return sum(entry.seconds(rates) for entry in passes)


def forward_passes(work: Arithmetic, *, images: int, itemsize: int) -> tuple[Pass, ...]:
    """Return the passes of a forward pass in training.

    itemsize: bytes of a number of the type that is computed in; so below.
    """
    main = Pass(
        operations=images * work.operations, bytes=itemsize * (images * (work.inputs + work.outputs) + work.weights)
    )
    return (main, Pass(bytes=itemsize * images * 3 * work.outputs)) if work.normed else (main,)


def backward_passes(work: Arithmetic, *, images: int, itemsize: int) -> tuple[Pass, ...]:
    """Return the passes of the backward pass."""
    operations, traffic = images * work.operations, images * (work.inputs + work.outputs) + work.weights
    if work.kind == "attention":  # reads queries, keys, values, the answer and its gradient; writes three gradients
        moved = itemsize * images * (2 * work.inputs + 2 * work.outputs)
        return (Pass(operations=FLASH_BACKWARD * operations, bytes=moved),)
    gradient = Pass(operations=operations, bytes=itemsize * traffic)
    gradients = (gradient,) if work.takes_images else (gradient, gradient)
    return (Pass(bytes=itemsize * images * 5 * work.outputs), *gradients) if work.normed else gradients


def step_work(
    arithmetic: Sequence[Arithmetic], *, images: int, itemsize: int, parameters: int, states: int = 1
) -> StepWork:
    """Return the work of a whole training step: forward, loss, backward, optimiser, moving average.

    images: of the batch on one device. parameters: numbers that are trained. states: numbers that the optimiser keeps
    of each: 1 for SGD with momentum, 2 for AdamW.
    The loss reads the network's outputs once in each direction and writes their gradient; what the assignment of
    targets needs besides is not counted. The optimiser's part holds the norm of the gradient and its division.
    """
    nodes: dict[int, list[Pass]] = defaultdict(list)
    forward: list[Pass] = []
    backward: list[Pass] = []
    for entry in arithmetic:
        there = forward_passes(entry, images=images, itemsize=itemsize)
        back = backward_passes(entry, images=images, itemsize=itemsize)
        forward += there
        backward += back
        nodes[entry.node] += [*there, *back]
    outputs = sum(entry.outputs for entry in arithmetic if entry.kind == "convolution" and not entry.normed)
    read = float(itemsize * images * outputs)
    state = MASTER_BYTES * parameters
    return StepWork(
        images=images,
        parts={
            "forward": tuple(forward),
            "loss": (Pass(bytes=read),),
            "backward": (Pass(bytes=2 * read), *backward),
            "optimiser": (Pass(bytes=state), Pass(bytes=2 * state), Pass(bytes=(3 + 2 * states) * state)),
            "ema": (Pass(bytes=3 * state),),
        },
        nodes={node: tuple(passes) for node, passes in nodes.items()},
    )


def evaluation_passes(arithmetic: Sequence[Arithmetic], *, images: int, itemsize: int) -> tuple[Pass, ...]:
    """Return the passes of the network alone in evaluation, its norms folded into the convolutions."""
    return tuple(
        Pass(
            operations=images * entry.operations,
            bytes=itemsize * (images * (entry.inputs + entry.outputs) + entry.weights),
        )
        for entry in arithmetic
    )
