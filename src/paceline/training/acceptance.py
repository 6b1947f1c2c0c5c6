"""Acceptance: what our kernels compute beside what torch does, on this very device, before a run relies on them.

Kernels are compiled for each device by whatever compiler is installed, and nobody has tried all of these. So each node
of the network is taken forward and backward three times, from equal weights, maps and gradients of its outputs:

```
exact     torch, single precision          its outputs are what the next node is given
theirs    torch, the run's precision       how far rounding alone takes them from `exact`
ours      kernels, the run's precision     must not be much farther
```
and the loss of the answers twice. By nodes, since through a whole network half precision leaves so little of a gradient
that a wrong one would not be noticed. What a machine has accepted is marked in Triton's cache (`ahead.py`); later runs
spare themselves the seconds.
"""

from __future__ import annotations

import copy
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from paceline.models.graph import leaves_join
from paceline.parallel.exhaustion import is_out_of_memory
from paceline.parallel.norms import BatchNorm, BatchStatistics
from paceline.planning.noise import noise_batch
from paceline.training.ahead import compile_ahead, mark
from paceline.training.plan import laid_out
from paceline.training.precision import Precision
from paceline.triton_kernels import kernels_left_out, usable

if TYPE_CHECKING:
    from torch import Tensor

    from paceline.batch import Batch
    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion

log = logging.getLogger("paceline")

IMAGES, SIDE = 2, 640
"""Of the batch."""
ROUNDING, LEAST = 4.0, 0.05
"""A tensor of ours may be so many times as far from the exact one as torch's, or at least so far, in shares of it."""
ROUNDING_OF_ALL, LEAST_OF_ALL = 1.5, 0.01
"""The same for all tensors of a kind in a node on average, where chance counts for less."""
SMALL = 0.01
"""Tensors whose numbers are smaller than this share of others of their kind in the node are measured as if of that."""
LOSS_MOST = 0.1
"""So far may the loss and its gradients be: to which of two equal boxes a point goes may change by a rounding."""

Numbers = dict[str, "Tensor"]
"""Tensors by name, the kind first."""


def objection(network: DetectionModel, criterion: Criterion, precision: Precision) -> str:
    """Say what speaks against our kernels on the network's device; empty where they may be used, or cannot be anyway.

    Takes some seconds where nothing is remembered. The network stays as it is.
    """
    device = next(network.parameters()).device
    if not usable(device):
        return ""
    compile_ahead(network, criterion, precision.amp_dtype)
    passed = mark("accepted", network, precision.amp_dtype, device)
    if passed.exists():
        return ""
    try:
        found = compared(network, criterion, precision)
    except Exception as error:  # of torch alone, memory that ran out among them: it says nothing about kernels
        log.debug("Kernels were not tried: %s", error)
        return ""
    if not found:
        with suppress(OSError):  # a disk that takes nothing: the next run does it again
            passed.parent.mkdir(parents=True, exist_ok=True)
            passed.touch()
    return found


def compared(
    network: DetectionModel, criterion: Criterion, precision: Precision, *, images: int = IMAGES, side: int = SIDE
) -> str:
    """Say where kernels differ from torch by more than rounding does; empty where they do not."""
    device = next(network.parameters()).device
    batch = noise_batch(images, side, network.num_classes, dtype=precision.amp_dtype or torch.float32, device=device)
    full = Precision(name="fp32")
    of_exact, of_theirs, of_ours = _Walk(network), _Walk(network), _Walk(network)
    live: tuple[Tensor, ...] = (batch.images,)
    for first, stop in _pieces(network):
        given = tuple(value.to(precision.amp_dtype or value.dtype) for value in live)
        with kernels_left_out():
            exact, live = of_exact.through(first, stop, given, full)
            theirs, _ = of_theirs.through(first, stop, given, precision)
        try:
            ours, _ = of_ours.through(first, stop, given, precision)
        except Exception as error:  # a kernel that cannot be compiled or started here, say
            if is_out_of_memory(error):
                raise
            return f"node {stop - 1} fails with them ({type(error).__name__}: {str(error).strip()[:200]})"
        if found := too_far(ours, theirs, exact):
            return found
    with kernels_left_out():
        losses = _loss(criterion, live, batch, precision)
    for name, value in _loss(criterion, live, batch, precision).items():
        if not _distance(value, losses[name]) <= LOSS_MOST:
            return f"{name} is {_distance(value, losses[name]):.2g} of itself away from what torch computes"
    return ""


def too_far(ours: Numbers, theirs: Numbers, exact: Numbers) -> str:
    """Name the tensor, or the kind of tensors, of `ours` that is farther from `exact` than `theirs` explains.

    The first word of a name is its kind.
    """
    for kind in {name.partition(" ")[0]: None for name in exact}:
        names = [name for name in exact if name.partition(" ")[0] == kind]
        usual = sum(float(exact[name].double().square().sum()) for name in names)
        usual = (usual / max(sum(exact[name].numel() for name in names), 1)) ** 0.5
        mine = {name: _distance(ours[name], exact[name], SMALL * usual) for name in names}
        other = {name: _distance(theirs[name], exact[name], SMALL * usual) for name in names}
        for name in names:
            if not mine[name] <= max(ROUNDING * other[name], LEAST):  # what is no number is too far
                return _sentence(name, mine[name], other[name])
        all_mine, all_other = sum(mine.values()) / len(names), sum(other.values()) / len(names)
        if not all_mine <= max(ROUNDING_OF_ALL * all_other, LEAST_OF_ALL):
            return _sentence(f"each from {names[0]} to {names[-1]}, on average,", all_mine, all_other)
    return ""


def _sentence(name: str, mine: float, other: float) -> str:
    return f"{name} is {mine:.2g} of itself away from single precision, and torch's is {other:.2g}"


class _Walk:
    """Goes through a copy of a network in pieces, forward and backward."""

    def __init__(self, network: DetectionModel) -> None:
        self._network = laid_out(copy.deepcopy(network), channels_last=True).train()
        BatchStatistics(self._network)

    def through(
        self, first: int, stop: int, given: tuple[Tensor, ...], precision: Precision
    ) -> tuple[Numbers, tuple[Tensor, ...]]:
        """Take the values before node `first` through the nodes before `stop`; return all that comes of it, and these.

        Gradients of what the nodes give are random, the same for equal shapes.
        """
        segment, where = self._network.segment(first, stop), f"node {stop - 1}"
        leaves = tuple(value.detach().requires_grad_(first > 0) for value in given)  # images have no gradient
        dtype, kind = precision.amp_dtype, given[0].device.type
        with torch.autocast(kind, dtype=dtype, enabled=dtype is not None):
            outputs = segment(*(leaf if dtype else leaf.float() for leaf in leaves))
        random = torch.Generator(given[0].device).manual_seed(0)
        gradients = [torch.randn(value.shape, generator=random, device=value.device).to(value) for value in outputs]
        torch.autograd.backward(outputs, gradients)
        numbers = {f"output {place} of {where}": value.detach() for place, value in enumerate(outputs)}
        for name, module in segment.named_modules():
            if isinstance(module, BatchNorm):
                numbers |= {f"mean of {name}": module.latest[0], f"variance of {name}": module.latest[1]}
        passed_on = ((f"input {place} of {where}: gradient", leaf.grad) for place, leaf in enumerate(leaves))
        of_weights = ((f"gradient of {name}", value.grad) for name, value in segment.named_parameters())
        numbers |= {name: value for name, value in (*passed_on, *of_weights) if value is not None}
        return numbers, tuple(value.detach() for value in outputs)


def _pieces(network: DetectionModel) -> list[tuple[int, int]]:
    """Cut a network into nodes, first and the one after the last; a join that is left to the next one stays with it."""
    pieces, first, count = [], 0, len(network.wiring)
    for node in range(count):
        if not leaves_join(network.model, network.wiring, node, count):
            pieces.append((first, node + 1))
            first = node + 1
    return pieces


def _loss(criterion: Criterion, answers: tuple[Tensor, ...], batch: Batch, precision: Precision) -> Numbers:
    """Return the loss of answers, in the type that a network would give them in, and its gradients."""
    leaves = tuple(answer.detach().to(precision.amp_dtype or answer.dtype).requires_grad_() for answer in answers)
    sums = criterion(leaves, batch)
    sums.total.backward()  # type: ignore[no-untyped-call]
    losses = {"the loss": sums.total.detach(), "the sum of target scores": sums.normaliser.detach()}
    named = zip(("boxes", "classes"), leaves, strict=True)
    return losses | {f"the loss' gradient of {name}": leaf.grad for name, leaf in named if leaf.grad is not None}


def _distance(value: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """Return how far a tensor is from another one, as a share of that; its numbers are as if of `least` on average."""
    exact = exact.double()
    apart = float((value.double() - exact).norm())
    length = max(float(exact.norm()), least * exact.numel() ** 0.5)
    return apart / length if length > 0 else 0.0 if apart == 0 else float("inf")
