"""The speed gate: what a step of yolo11n asks of the host and keeps in memory, in numbers that no load can change.

Counted are dispatched operations, bytes that wait for the backward pass, and waits for the device; never seconds. The
bounds are the exact counts of today: a change that adds an operation to the step has to raise one here, and say so; one
that saves some lowers it.
They hold for the torch that they were counted with, where they are the same on every machine. Another version writes
some of its own formulas differently, so there they may be exceeded by 3 percent: a second look at a tensor per layer
is 80 operations of 1,700, and is still noticed.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from compiling import run_apart
from device_cases import NeverWaits
from steps import make_step, run, works
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.models.registry import build_model
from paceline.native import norm
from paceline.training.plan import laid_out
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

COUNTED_WITH = "2.13"
SLACK = 0.0 if torch.__version__.startswith(COUNTED_WITH) else 0.03

FIXED_SHAPES = {"SGD": (1671, 1744), "AdamW": (1671, 1728)}
"""Operations of a step that accumulates, and of one that completes an update: the way of GPUs, compilers and graphs."""
ON_THE_HOST = {"SGD": (1712, 1785), "AdamW": (1712, 1769)}
"""The same where host and device are one, and shapes may follow from the data."""
IN_BFLOAT16 = (1906, 1979)
"""The same as `FIXED_SHAPES` of SGD under autocast."""
COMPILED, COMPILED_IN_BFLOAT16 = (1703, 1776), (1938, 2011)
"""The same as `ON_THE_HOST` of SGD with norms by compiled code, without and under autocast."""
WAITING_BYTES = {None: 2_279_697, torch.bfloat16: 2_917_468}
"""Bytes per picture, of three of 64 x 64 px, that wait for the backward pass, by type of autocast: activations, and
under autocast a third of the weights in that type."""
WAITING_COMPILED_BYTES = {None: 1_578_236, torch.bfloat16: 2_557_510}
"""The same with norms by compiled code, which keep what they were given alone."""


class Operations(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _by_torch(request: pytest.FixtureRequest) -> Iterator[None]:
    """Leave norms to torch, as where nothing is compiled, but for tests that ask for `compiled`."""
    with nullcontext() if "compiled" in request.fixturenames else kernels_left_out():
        yield


@pytest.fixture
def compiled() -> None:
    """Norms by compiled code."""
    if norm.kernels() is None:
        pytest.skip("it was not built, or this machine has no vector units that it is fast with")


def yolo(optimizer: str, *, channels_last: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    network = laid_out(build_model("yolo11n", 3), channels_last=channels_last)
    return make_step(optimizer, network=network, dtype=torch.float32, **options)


def counted(step: Any, optimizer: str) -> tuple[int, int]:
    """Count the operations of an accumulating and of a completing step, after a first one of each."""
    asked = works(24, optimizer, boxes=(4,))
    accumulates = next(work for work in asked if not work.completes)
    completes = next(work for work in asked if work.completes)
    run(step, [accumulates, completes])
    found = []
    for work in (accumulates, completes):
        with Operations() as operations:
            step(work.batch, work.rates, completes=work.completes)
        found.append(operations.names.total())
    return found[0], found[1]


def assert_within(found: tuple[int, ...], bounds: tuple[int, ...]) -> None:
    assert all(value <= bound * (1 + SLACK) for value, bound in zip(found, bounds, strict=True)), (found, bounds)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_operations_of_a_step_with_fixed_shapes(optimizer: str) -> None:
    assert_within(counted(yolo(optimizer), optimizer), FIXED_SHAPES[optimizer])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_operations_of_a_step_where_host_and_device_are_one(optimizer: str) -> None:
    assert_within(counted(yolo(optimizer, fixed_shapes=False), optimizer), ON_THE_HOST[optimizer])


def test_operations_of_a_step_under_autocast() -> None:
    assert_within(counted(yolo("SGD", amp_dtype=torch.bfloat16), "SGD"), IN_BFLOAT16)


@pytest.mark.usefixtures("compiled")
def test_operations_of_a_step_with_compiled_norms() -> None:
    options = {"fixed_shapes": False, "channels_last": True}
    assert_within(counted(yolo("SGD", **options), "SGD"), COMPILED)
    assert_within(counted(yolo("SGD", amp_dtype=torch.bfloat16, **options), "SGD"), COMPILED_IN_BFLOAT16)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_bytes_that_wait_with_compiled_norms(amp_dtype: torch.dtype | None) -> None:
    assert_within((waiting_bytes(amp_dtype, channels_last=True),), (WAITING_COMPILED_BYTES[amp_dtype],))


@pytest.mark.parametrize("amp_dtype", [None, torch.bfloat16])
def test_bytes_that_wait_for_the_backward_pass(amp_dtype: torch.dtype | None) -> None:
    assert_within((waiting_bytes(amp_dtype),), (WAITING_BYTES[amp_dtype],))


def waiting_bytes(amp_dtype: torch.dtype | None, *, channels_last: bool = False) -> int:
    """Count the bytes per picture that a step keeps for its backward pass."""
    step, (work,) = yolo("SGD", amp_dtype=amp_dtype, channels_last=channels_last), works(1)
    owned = {value.untyped_storage().data_ptr() for value in step.engine.network.parameters()}
    waiting: dict[int, tuple[torch.Tensor, int]] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            waiting[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(work.batch, work.rates, completes=work.completes)
    return sum(size for _, size in waiting.values()) // len(work.batch)


def test_a_step_with_fixed_shapes_never_waits() -> None:
    step, asked = yolo("SGD"), works(2)
    with NeverWaits():
        run(step, asked)


def test_one_more_operation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = yolo("SGD")
    take_in = step.ema.take_in
    monkeypatch.setattr(step.ema, "take_in", lambda: (take_in(), torch.ones(1).sin()))
    with pytest.raises(AssertionError) if SLACK == 0 else nullcontext():
        assert_within(counted(step, "SGD"), FIXED_SHAPES["SGD"])


_PROGRAM = """
import sys

sys.path[:0] = sys.argv[1:]
from steps import make_step, run, works

run(make_step("SGD"), works(1, "SGD", boxes=(4,)))
print(*sorted({"sympy", "torch._dynamo", "triton"} & set(sys.modules)))
"""


def test_a_step_on_a_cpu_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """As PyTorch does for a backward pass that is given what to start with: .3 s and 35 MB of each process."""
    assert run_apart(_PROGRAM, tmp_path, *sys.path) == ""
