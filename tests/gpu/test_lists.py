"""Lists by kernels on a CUDA device, eager and in a recorded graph, beside the same by torch."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import TYPE_CHECKING

import pytest
import torch
from listed import MANY, OPTIMIZERS, SHAPES, Listed, Place, Watched, updated
from waiting import errors_where_the_host_waits

from paceline import lists
from paceline.lists import Walks, convert
from paceline.training.ema import Ema
from paceline.training.graphed import CudaCapture
from paceline.training.optim import update
from paceline.triton_kernels import kernels_left_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")
PLACES = [Place(shape, nth % 5, nth % 2 == 0) for nth, shape in enumerate([*SHAPES, (300_001,), (64, 32, 3, 3)] * 8)]
"""Some 100 tensors, among them one of many chunks."""


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6, equal_nan=True)
        assert one.stride() == other.stride()


def test_kernels_take_such_lists() -> None:
    values = Listed(PLACES, device="cuda").parameters
    assert Walks().over(values) is not None
    with kernels_left_out():
        assert Walks().over(values) is None


@pytest.mark.parametrize("clip", [0.0, 0.5])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_gradients_are_divided_and_clipped_as_by_torch(clip: float, value: float | None) -> None:
    found = []
    for way in (nullcontext, nullcontext, kernels_left_out):
        listed = Listed(PLACES, device="cuda", scale=64.0)
        listed.give_gradients(value=value)
        total = listed.counted(listed.gradient_sum(clip=clip))
        with way():
            not_finite = total.finish()
        found.append([not_finite, *listed.gradients(), *total.state()])
    assert float(found[0][0]) == float(value is not None)
    assert_near(found[0], found[2])
    if value is None:
        assert all(torch.equal(one, other) for one, other in zip(*found[:2], strict=True)), "the same bits each time"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch(name: str) -> None:
    found = updated(Listed(MANY, device="cuda"), name)
    with kernels_left_out():
        expected = updated(Listed(MANY, device="cuda"), name)
    for ours, theirs in zip(found, expected, strict=True):
        assert_near(ours, theirs)
    assert all(torch.equal(one, other) for one, other in zip(found[1], found[2], strict=True)), "left out"


class Training:
    """Updates of parameters from gradients that are made anew for each, and their average."""

    def __init__(self, name: str) -> None:
        self._listed = Listed(PLACES, device="cuda", scale=4.0)
        self.sources = [parameter.detach().clone() for parameter in self._listed.parameters]
        self._total = self._listed.gradient_sum(clip=0.5)
        self._optimizer = self._listed.optimizer(name)
        self._watched = Watched(self._listed.parameters)
        self._ema = Ema(self._watched, average=copy.deepcopy(self._watched), ramp_updates=3)

    def draw(self, seed: int, *, value: float | None = None) -> None:
        """Say what the gradients of the next update are, and the share of the average."""
        draw = torch.Generator().manual_seed(seed)
        for source in self.sources:
            source.copy_(torch.randn(source.shape, generator=draw))
        if value is not None:
            self.sources[2][0] = value
        self._ema.advance()

    def work(self) -> None:
        """Do what the device does."""
        for parameter, source in zip(self._listed.parameters, self.sources, strict=True):
            parameter.grad = source.clone()
        self._watched.batches.add_(1)
        self._listed.counted(self._total)
        update(self._optimizer, self._total.finish())
        self._ema.take_in()

    def state(self) -> list[Tensor]:
        """Return all that changes in place."""
        average = list(self._ema.network.state_dict().values())
        entries = [value for values in self._optimizer.state.values() for value in values.values()]
        return [*self._watched.state_dict().values(), *average, *entries, *self._total.state()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_graph_does_the_same(name: str) -> None:
    """Gradients lie elsewhere in the graph than in eager updates before, between and after it."""
    graphed, eager, by_torch = Training(name), Training(name), Training(name)
    capture = CudaCapture(DEVICE)
    before = [value.detach().clone() for value in graphed.state()]
    with capture.aside():
        graphed.work()
    recording = capture.record(graphed.work)
    with torch.no_grad():
        for value, was in zip(graphed.state(), before, strict=True):
            value.copy_(was)
    for number in range(6):
        for training in (graphed, eager, by_torch):
            training.draw(number, value=float("nan") if number == 3 else None)
        if number == 4:
            kept = [torch.empty_like(source) for source in graphed.sources]  # so that gradients lie elsewhere
            graphed.work()
            del kept
        else:
            recording.replay()
        eager.work()
        with kernels_left_out():
            by_torch.work()
        assert all(torch.equal(one, other) for one, other in zip(graphed.state(), eager.state(), strict=True)), number
        assert_near(eager.state(), by_torch.state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_waits_once_the_tables_are_there(name: str) -> None:
    training = Training(name)
    training.draw(0)
    training.work()
    training.work()
    torch.cuda.synchronize()
    with errors_where_the_host_waits():
        training.work()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 3, 9, 20, 40])
def test_halves_are_those_of_torch_to_the_bit_and_back(dtype: torch.dtype, count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    of = [place.filled(draw, device="cuda").mul_(10.0 ** (nth % 9 - 4)) for nth, place in enumerate(PLACES[:count])]
    capture = CudaCapture(DEVICE)
    made: list[list[Tensor]] = []

    def work() -> None:
        halves = [torch.empty_like(value, dtype=dtype) for value in of]
        convert(halves, of, kernels=True)
        back = [torch.empty_like(value) for value in of]
        convert(back, halves, kernels=True)
        made.append(halves + back)

    with capture.aside():
        work()
    recording = capture.record(work)
    for value in of:
        value.neg_()
    recording.replay()
    for found, sign in zip(made, (-1, 1), strict=True):
        for value, half, again in zip(of, found[: len(of)], found[len(of) :], strict=True):
            assert half.stride() == again.stride() == value.stride()
            assert torch.equal(half, (sign * value).to(dtype))
            assert torch.equal(again, half.float())


def test_kernels_are_what_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else here compares torch with itself where they do not."""
    started: list[str] = []
    start = lists.start_kernel
    monkeypatch.setattr(
        lists,
        "start_kernel",
        lambda kernel, *given, **options: (started.append(kernel.fn.__name__), start(kernel, *given, **options)),
    )
    training = Training("AdamW")
    training.draw(0)
    training.work()
    assert {"_note", "_squares", "_settle", "_multiply", "_count", "_adapt", "_approach", "_copy"} == set(started)
