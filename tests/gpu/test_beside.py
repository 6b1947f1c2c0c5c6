"""Streams of a recording on a CUDA device: what is computed side by side is what is computed in order."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest
import torch
from steps import everything, make_step, run, works

from paceline.models import ends, heads
from paceline.models.heads import DetectionHead
from paceline.models.operations import beside
from paceline.models.registry import build_model
from paceline.streams import stream_for
from paceline.training.graphed import CudaCapture, GraphedStep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda")


@pytest.fixture(autouse=True)
def deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


def replayed(name: str, updates: int) -> list[Tensor]:
    """Return losses and state of a network after updates by graphs in bfloat16."""
    torch.manual_seed(0)
    network = build_model(name, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inner = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
    step = GraphedStep(inner, CudaCapture(DEVICE))
    said = run(step, works(updates, "SGD", device="cuda", boxes=(4,)))
    assert step.num_graphs > 0
    return [*said, *everything(inner)["state"]]


@contextmanager
def _in_order(number: int, x: Tensor) -> Iterator[None]:
    yield


@pytest.mark.parametrize("what", ["all", "gradients of weights"])
@pytest.mark.parametrize("name", ["yolo11n", "yolov8n", "yolo11m"])
def test_no_bit_depends_on_streams(name: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what != "all":
        for module in (heads, ends):
            monkeypatch.setattr(module, "apart", _in_order)
        monkeypatch.setattr(heads, "together", lambda given: None)
    found = replayed(name, 12)
    monkeypatch.setattr(beside, "_is_recording", lambda device: False)
    expected, again = replayed(name, 12), replayed(name, 12)
    if not all(torch.equal(one, other) for one, other in zip(expected, again, strict=True)):
        pytest.skip("without streams two runs differ here, too")
    differ = [
        (number, float((one.double() - other.double()).abs().max()), float(other.double().abs().max()))
        for number, (one, other) in enumerate(zip(found, expected, strict=True))
        if not torch.equal(one, other)
    ]
    assert not differ, f"{len(differ)} of {len(found)}: {differ[:6]}"


def test_what_is_recorded_goes_by_several_streams() -> None:
    """Each branch of the head and the gradients of weights have one; the recording would end with an error without."""
    replayed("yolo11n", 2)
    numbers = [beside.OF_STATISTICS, -1, *range(6)]
    assert len({beside._stream_of(DEVICE, number) for number in numbers}) == len(numbers)
    assert stream_for.cache_info().currsize >= len(numbers), "not anew for each recording"
    assert not beside._read
    assert not beside._made


class _Breaks(torch.autograd.Function):
    """Has no memory in a recording, on the way that is asked for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, backward: bool) -> Tensor:
        ctx.backward = backward
        if not backward and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor, None]:
        if ctx.backward and torch.cuda.is_current_stream_capturing():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 7 PiB")
        return of_y, None


@pytest.mark.parametrize("where", ["the neck", "a branch"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_recording_that_breaks_off_leaves_nothing(
    where: str, backward: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends as a recording, so that the stream is the caller's again and memory that was lent comes back."""
    network = build_model("yolo11n", 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    (head,) = (module for module in network.modules() if isinstance(module, DetectionHead))
    unit = head.cv3[1][1] if where == "a branch" else network.model["19"]  # type: ignore[index]
    unit.register_forward_hook(lambda module, given, y: _Breaks.apply(y, backward))
    inner = make_step("SGD", network=network, dtype=torch.float32, device="cuda", amp_dtype=torch.bfloat16)
    step = GraphedStep(inner, CudaCapture(DEVICE))
    stream = torch.cuda.current_stream()
    with caplog.at_level(logging.WARNING, logger="paceline"):
        run(step, works(4, "SGD", device="cuda", boxes=(4,)))
    assert step.num_graphs == 0
    assert "CUDA out of memory" in caplog.text, "not that streams have not come together"
    assert torch.cuda.current_stream() == stream
    assert not any((beside._read, beside._made, beside._taken))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    lent = torch.empty(1 << 20, device=DEVICE)
    lent.record_stream(torch.cuda.Stream(DEVICE))  # type: ignore[no-untyped-call]
    del lent
    torch.cuda.synchronize()
    torch.empty(1 << 20, device=DEVICE)  # what was lent is looked after when memory is asked for
    assert torch.cuda.memory_allocated() <= before, "an allocator in a recording keeps what was lent"
