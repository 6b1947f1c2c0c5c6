"""Ahead: the kernels of a step compiled before it is taken, in threads.

A copy of the network without numbers takes a step on the `meta` device, which starts no kernel and names those that a
real one would (`triton_kernels.compiled_ahead`). What is foreseen wrongly costs nothing but its compilation: a real
step compiles what it does not find. That all of a network has been compiled is marked in Triton's cache, where the mark
goes with what it stands for; a later process that finds it does nothing.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from paceline.batch import Batch
from paceline.parallel.fingerprint import digest_of_package
from paceline.parallel.gradient import GradientSum
from paceline.parallel.loss_scale import LossScale
from paceline.parallel.norms import BatchStatistics
from paceline.training.ema import Ema
from paceline.training.optim import OptimPlan, build_optimizer
from paceline.triton_kernels import compiled_ahead, usable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from paceline.models.graph import DetectionModel
    from paceline.parallel.engine import Criterion

log = logging.getLogger("paceline")

_SIDE, _IMAGES, _BOXES = 640, 64, 32
"""Of the batch: no kernel is compiled for its size, but for what eight divides; one is for large ones alone."""
_ODD_SIDE = 96
"""Of images with 189 points."""
_TOLD_S = 5.0
"""From which on it is worth a line of the log."""
_MOST_THREADS = 16
"""Each compiles in some hundred MB, and assembles in a process of its own."""
_done: set[tuple[str, int, torch.dtype, torch.device]] = set()
"""Networks by name, classes, type and device, whose kernels this process has compiled."""
_HALF_BY_AUTOCAST = (F.conv2d, F.scaled_dot_product_attention, torch.matmul, F.linear)


class _AsOnGpu(TorchFunctionMode):
    """Does on the `meta` device what a GPU does there: autocast, and convolutions whose results are channels-last."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function, on values of half precision where autocast would."""
        if func in _HALF_BY_AUTOCAST:
            args = tuple(self._cast(value) for value in args)
            kwargs = {name: self._cast(value) for name, value in (kwargs or {}).items()}
        result = func(*args, **(kwargs or {}))
        return result.contiguous(memory_format=torch.channels_last) if func is F.conv2d else result

    def _cast(self, value: Any) -> Any:
        is_one = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(self._dtype) if is_one else value


def compile_ahead(network: DetectionModel, criterion: Criterion, amp_dtype: torch.dtype | None) -> None:
    """Compile the kernels of a step of this network on its GPU, once for each kind of network and type.

    Does nothing on other devices, in single precision, where Triton cannot compile in threads, and where Triton's cache
    says that an earlier process has done it. It never fails: the step itself would compile what is missing, and say
    what is wrong.
    """
    device = next(network.parameters()).device
    if device.type != "cuda" or amp_dtype is None or not usable(device):
        return
    kind = (network.name, network.num_classes, amp_dtype, device)
    if kind in _done:
        return
    _done.add(kind)
    begin = time.perf_counter()
    try:
        done = mark("compiled", network, amp_dtype, device)
        if done.exists():
            return
        with torch.cuda.device(device), compiled_ahead(min(len(os.sched_getaffinity(0)), _MOST_THREADS)):
            imagined_step(network, criterion, amp_dtype)
            imagined_odd_loss(network, criterion, amp_dtype)
        done.parent.mkdir(parents=True, exist_ok=True)
        done.touch()
    except Exception as error:  # of Triton, of a step that cannot be imagined, or of a disk
        log.debug("Kernels were not compiled ahead: %s", error)
        return
    took = time.perf_counter() - begin
    if took > _TOLD_S:
        log.info("Kernels for %s were compiled in %.0f s; later runs on this machine find them.", network.name, took)


def mark(what: str, network: DetectionModel, amp_dtype: torch.dtype | None, device: torch.device) -> Path:
    """Return the file in Triton's cache that says that this is so of all kernels of such steps on such a GPU."""
    import triton

    of_device = (torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))
    of_step = (network.name, network.num_classes, amp_dtype)
    versions = (torch.__version__, triton.__version__, digest_of_package())
    digest = hashlib.blake2b(repr((what, of_step, of_device, versions)).encode(), digest_size=8).hexdigest()
    return Path(triton.knobs.cache.dir) / "paceline" / digest


def imagined_step(
    network: DetectionModel, criterion: Criterion, amp_dtype: torch.dtype, *, images: int = _IMAGES, side: int = _SIDE
) -> None:
    """Take a step, with the updates that each optimiser would make, of a copy of a network without numbers."""
    imagined = copy.deepcopy(network).to("meta").to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    BatchStatistics(imagined)
    batch = _imagined_batch(images, side, amp_dtype)
    with torch.autocast("cuda", dtype=amp_dtype), _AsOnGpu(amp_dtype):
        predictions = imagined(batch.images)
    criterion(predictions, batch).total.backward()  # type: ignore[no-untyped-call]
    _imagined_update(imagined)


def imagined_odd_loss(network: DetectionModel, criterion: Criterion, amp_dtype: torch.dtype) -> None:
    """Take the loss of answers whose numbers 16 does not divide as a rule, and with more room for claims than points.

    Its passes over all numbers are compiled for either, and image sizes are both; 16 classes are always even.
    """
    batch = _imagined_batch(1, _ODD_SIDE, amp_dtype)
    num_points = sum((_ODD_SIDE // stride) ** 2 for stride in network.strides)
    answers = tuple(
        torch.empty(1, num_points, width, dtype=amp_dtype, device="meta", requires_grad=True)
        for width in (4 * network.reg_max, network.num_classes)
    )
    criterion(answers, batch).total.backward()  # type: ignore[no-untyped-call]


def _imagined_batch(images: int, side: int, dtype: torch.dtype) -> Batch:
    return Batch(
        images=torch.empty(images, 3, side, side, dtype=dtype).contiguous(memory_format=torch.channels_last),
        boxes=torch.zeros(images, _BOXES, 4),
        labels=torch.zeros(images, _BOXES, dtype=torch.int64),
        valid=torch.zeros(images, _BOXES, dtype=torch.bool),
        samples=torch.zeros(images, dtype=torch.int64),
        original_hw=torch.zeros(images, 2, dtype=torch.int64),
    ).to("meta")


def _imagined_update(network: DetectionModel) -> None:
    trained = {name: value for name, value in network.named_parameters() if value.requires_grad}
    device = torch.device("meta")
    GradientSum(trained, device, clip=1.0, loss_scale=LossScale(1.0, device, adaptive=False)).finish()
    rates = OptimPlan(name="SGD", lr0=0.01, momentum=0.9, warmup_momentum=0.9, warmup_bias_lr=0.0, weight_decay=1e-4)
    for plan in (rates, replace(rates, name="AdamW")):
        build_optimizer(plan, network).step()
    Ema(network).take_in()
